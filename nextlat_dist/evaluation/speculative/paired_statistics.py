"""Estimates from turns in which all sides took part: medians over the turns, with intervals of their own.

    estimate(values) -> Estimate
    best_of(rates, halves) -> Best

Speeds are compared turn by turn: the ratio of two sides within a turn, its median over the turns, and the interval of
that median under resampling of the turns (both sides of a turn are drawn together). The median, because a machine that
other work shares has slow spells, and a mean would be about them.

The best of ten noisy numbers looks better than it is: it is chosen for its luck, too. So the best fixed draft length
is cross-fitted: the turns are two halves, and each half is measured with the length that was the best in the *other*
half. "The best fixed length" is then what somebody gets who chose it by measuring as often as half of the turns. With
hindsight (`Best.in_sample`: the length that is best over all turns, measured on these very turns) the comparison is
stricter by that luck; both are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

BOOTSTRAP_SAMPLES = 1000
Side = TypeVar("Side")


@dataclass(frozen=True)
class Estimate:
    """A median over turns with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def estimate(values: np.ndarray) -> Estimate:
    """`values` [turns]; the same turns are drawn for every array of one length, so ratios stay paired."""
    samples = np.random.default_rng(0).choice(values, (BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.quantile(np.median(samples, axis=1), [0.025, 0.975])
    return Estimate(float(np.median(values)), float(low), float(high))


@dataclass(frozen=True)
class Best(Generic[Side]):
    """The best of several sides.

    Attributes:
        side: the best over all turns.
        rates: [turns], every turn at the rate of the side that was best in the other half of the turns.
        in_sample: [turns], the rates of `side`.
    """

    side: Side
    rates: np.ndarray
    in_sample: np.ndarray


def best_of(rates: Mapping[Side, np.ndarray], baseline: np.ndarray, halves: np.ndarray) -> Best[Side]:
    """Choose by the median over turns of the ratio to `baseline`.

    Args:
        rates: by side, [turns] each.
        baseline: [turns].
        halves: [turns], 0 or 1, both there.
    """

    def choose(chosen: np.ndarray) -> Side:
        return max(rates, key=lambda side: float(np.median(rates[side][chosen] / baseline[chosen])))

    crossed = np.where(halves == 0, rates[choose(halves == 1)], rates[choose(halves == 0)])
    side = choose(np.ones_like(halves, dtype=bool))
    return Best(side, crossed, rates[side])
