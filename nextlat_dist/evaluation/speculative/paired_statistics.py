"""Estimates from trials in which all methods took part: medians over the trials, with their intervals.

    estimate(values) -> Estimate
    best_of(rates, baseline, halves) -> Best

Speeds are compared trial by trial: the ratio of two methods within a trial, its median over the trials, and the
interval of that median under resampling of the trials (both methods of a trial are drawn together). The median, because
a machine that other work shares has slow spells, and a mean would be about them.

The best of ten noisy numbers looks better than it is: it is chosen for its luck, too. So the best fixed draft length
is cross-fitted: the trials are two halves, and each half is measured with the length that was the best in the *other*
half. "The best fixed length" is then what somebody gets who chose it by measuring as often as half of the trials. With
hindsight (`Best.in_sample`: the length that is best over all trials, measured on these very trials) the comparison is
stricter by that luck; both are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

BOOTSTRAP_SAMPLES = 1000  # 25 medians lie beyond each end of a 95% interval
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Estimate:
    """A median over trials with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """As three flat names."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}

    @classmethod
    def read(cls, entry: Mapping[str, Any], name: str) -> Estimate | None:
        """From `named`; None where it was not measured."""
        return cls(entry[name], entry[f"{name}_low"], entry[f"{name}_high"]) if name in entry else None


def estimate(values: np.ndarray) -> Estimate:
    """`values` [trials]; the same trials are drawn for every array of one length, so ratios stay paired."""
    samples = np.random.default_rng(0).choice(values, (BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.quantile(np.median(samples, axis=1), [0.025, 0.975])
    return Estimate(float(np.median(values)), float(low), float(high))


@dataclass(frozen=True)
class Best(Generic[Choice]):
    """The best of several choices.

    Attributes:
        choice: the best over all trials.
        rates: [trials], every trial at the rate of the choice that was best in the other half of the trials.
    held_out: those choices, trial by trial.
        in_sample: [trials], the rates of `choice`.
    """

    choice: Choice
    rates: np.ndarray
    in_sample: np.ndarray
    held_out: tuple[Choice, ...]


def best_of(rates: Mapping[Choice, np.ndarray], baseline: np.ndarray, halves: np.ndarray) -> Best[Choice]:
    """Choose by the median over trials of the ratio to `baseline`.

    Args:
        rates: by choice, [trials] each.
        baseline: [trials].
        halves: [trials], 0 or 1, both there.
    """

    def choose(chosen: np.ndarray) -> Choice:
        return max(rates, key=lambda choice: float(np.median(rates[choice][chosen] / baseline[chosen])))

    for_half = {0: choose(halves == 1), 1: choose(halves == 0)}
    crossed = np.where(halves == 0, rates[for_half[0]], rates[for_half[1]])
    choice = choose(np.ones_like(halves, dtype=bool))
    return Best(choice, crossed, rates[choice], tuple(for_half[int(half)] for half in halves))
