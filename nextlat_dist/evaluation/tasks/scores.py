"""Scores of an export on a task: shares with their uncertainty, single ones and by position.

Invariant: a share keeps its counts, so pooling and intervals never depend on how documents were batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nextlat_dist.reporting.console import Progress

Z_95 = 1.959963984540054  # two-sided 95% of the normal distribution
Watch = Callable[[str, int], Progress]  # what is done and the number of its batches → what is told of each batch


def unwatched(label: str, total: int) -> Progress:
    return Progress(label, total, shown=False)


@dataclass(frozen=True)
class Share:
    """`right` of `total` independent cases (documents)."""

    right: int
    total: int

    @classmethod
    def of(cls, cases: Iterable[bool]) -> Share:
        """From the cases themselves."""
        values = [bool(case) for case in cases]
        return cls(sum(values), len(values))

    @property
    def value(self) -> float:
        """NaN of no case at all."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval; (0, 1) of no case at all."""
        if not self.total:
            return 0.0, 1.0
        squared = Z_95**2 / self.total
        centre = (self.value + squared / 2) / (1 + squared)
        half = math.sqrt(squared * (self.value * (1 - self.value) + squared / 4)) / (1 + squared)
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Curve:
    """Shares by position: `shares[i]` is that of position `first + i`."""

    first: int
    shares: tuple[Share, ...]

    @classmethod
    def of(cls, first: int, right: Sequence[np.ndarray]) -> Curve:
        """From one row of bools per document, all beginning at position `first`, of any lengths."""
        longest = max(map(len, right), default=0)
        return cls(first, tuple(Share.of(row[index] for row in right if index < len(row)) for index in range(longest)))

    def at(self, position: int) -> Share:
        """Raises IndexError outside the curve."""
        if position < self.first:
            raise IndexError(position)
        return self.shares[position - self.first]

    @property
    def last(self) -> int:
        return self.first + len(self.shares) - 1


@dataclass
class Scores:
    """One export on one task.

    Attributes:
        numbers: flat name → share, or a plain number where it is no share of independent cases.
        curves: flat name → shares by position.
        guesses: what a model that knows nothing but the rules of the task would reach, by the name of a number.
    """

    numbers: dict[str, Share | float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    guesses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """How free-running answers are drawn."""

    temperatures: tuple[float, ...]  # 0: greedy
    seed: int


def how(temperature: float) -> str:
    """End of a number's name."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


Runs = Mapping[str, Sequence[Scores]]  # by name of the export
