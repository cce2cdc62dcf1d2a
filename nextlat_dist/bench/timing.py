"""Fair timing on a noisy machine: one core, and methods whose trials alternate.

Invariant: what is compared was measured in the same run, round by round and in an order that rotates, so a slow spell
of the machine moves neither term of a ratio.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from nextlat_dist.reporting.tables import Columns, table

Name = TypeVar("Name", bound=Hashable)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Keep this thread, and the threads and processes it starts, on `count` of the cores it may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@dataclass(frozen=True)
class Rates:
    """Units per second of one method, round by round.

    Attributes:
        rounds: per second that passed.
        cpu_rounds: per second that this process was given by the machine; much more than `rounds` where it was busy
            with something else.
    """

    rounds: tuple[float, ...]
    cpu_rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_rounds)

    def ratio_to(self, other: Rates) -> float:
        """Median over the rounds of the ratio within a round."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))

    def cpu_time_over(self, other: Rates) -> float:
        """Median over the rounds of this method's processor time for a unit over the other's within a round."""
        return statistics.median(b / a for a, b in zip(self.cpu_rounds, other.cpu_rounds, strict=True))


def alternate(
    methods: Mapping[Name, Callable[[], int]], rounds: int, done: Callable[[Name], None]
) -> dict[Name, Rates]:
    """Run every method `rounds` times after one trial that does not count; each returns how many units it handled.

    `done` is told the name of a method after each of its `rounds + 1` trials.
    """
    names = list(methods)
    rates: dict[Name, list[tuple[float, float]]] = {name: [] for name in names}
    for trial in range(rounds + 1):
        first = trial % len(names)
        for name in names[first:] + names[:first]:
            started, cpu_started = time.perf_counter(), time.process_time()
            units = methods[name]()
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            if trial:
                rates[name].append((units / seconds, units / cpu_seconds))
            done(name)
    return {name: Rates(*map(tuple, zip(*values, strict=True))) for name, values in rates.items()}


COLUMNS = {
    "measurement": "{measurement}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "lowest": "{lowest:,.0f}",
    "highest": "{highest:,.0f}",
    "tokens/CPU s": "{tokens_per_cpu_second:,.0f}",
    "seconds": "{seconds:.3f}",
}


def row(measurement: str, *, rates: Rates | None = None, seconds: float | None = None) -> dict[str, Any]:
    """A row of the table of `COLUMNS`."""
    return {
        "measurement": measurement,
        "tokens_per_second": rates and rates.median,
        "lowest": rates and min(rates.rounds),
        "highest": rates and max(rates.rounds),
        "tokens_per_cpu_second": rates and rates.cpu_median,
        "seconds": seconds,
    }


def with_summary(columns: Columns, rows: Sequence[Any], summary: Mapping[str, float]) -> str:
    """The table, and a line for each number of the summary."""
    numbers = [
        f"{name} = {value:,.4g}" if value < 1000 else f"{name} = {value:,.0f}" for name, value in summary.items()
    ]
    return "\n".join([table(columns, rows), *numbers])
