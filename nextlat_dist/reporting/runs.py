"""One number over the runs (seeds) of one name: mean, standard deviation, lowest and highest."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OverRuns:
    """Attributes:
    values: of the runs, at least one.
    interval: of a single run: the confidence interval of its number, where it has one.
    """

    values: tuple[float, ...]
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        assert self.values, "no run has this number"
        assert self.interval is None or len(self.values) == 1, "several runs have a range, not an interval"

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1); None for a single run."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest of several runs; of a single one its interval, None where it has none."""
        return (self.lowest, self.highest) if self.n > 1 else self.interval

    def with_deviation(self) -> str:
        """`0.512 ± 0.020`."""
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"

    def with_bounds(self) -> str:
        """`0.512 (0.490–0.530)`."""
        return f"{self.mean:.3f}" if self.bounds is None else "{:.3f} ({:.3f}–{:.3f})".format(self.mean, *self.bounds)


def over_runs(values: Iterable[float], interval: tuple[float, float] | None = None) -> OverRuns:
    """Of one value for each run; `interval` counts where there is a single run."""
    found = tuple(float(value) for value in values)
    return OverRuns(found, interval if len(found) == 1 else None)
