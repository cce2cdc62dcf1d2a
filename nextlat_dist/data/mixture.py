"""Which source each row of a weighted mixture comes from: a pure function of the weights and the row number.

After n rows a source with weights w has been due T(n) = w(0) + … + w(n-1) rows. Every row goes to the source that is
soonest at its limit among those that have a row due, so that for k sources and every n

    |rows taken from a source - T(n)| <= 1 - 1 / (2k - 2)        (R. Tijdeman, The chairman assignment problem, 1980)

No rule does better in the worst case; taking the source that lags most, as is common, can lag by more than one row.
Invariant: all arithmetic is on whole numbers, so that every machine takes the same rows; where a mixture stands is one
count per source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import inf, lcm

import numpy as np

from nextlat_dist.errors import UserError


class Mixture:
    """Sources with weights, which may change at given rows.

    Args:
        weights: of each source; need not sum to one, zero is allowed.
        changes: (row, weights of all sources from this row on), rows increasing.

    Attributes:
        names: of the sources, in the order of `weights`; a source's number is its position here.

    Raises:
        UserError: a negative weight, no positive one, unknown or missing names, or rows out of order.
    """

    def __init__(self, weights: Mapping[str, float], changes: Sequence[tuple[int, Mapping[str, float]]] = ()) -> None:
        self.names = tuple(weights)
        phases = [(0, _shares(self.names, weights))]
        for row, changed in changes:
            if row <= phases[-1][0]:
                raise UserError(f"weights change at row {row} after row {phases[-1][0]}; put the changes in order")
            phases.append((row, _shares(self.names, changed)))
        # Counted in units of 1 / scale rows everything below is whole.
        slack = max(2 * len(self.names) - 2, 1)
        self._one = slack * lcm(*(share.denominator for _, shares in phases for share in shares))
        self._slack = self._one // slack if len(self.names) > 1 else 0
        self._begins = [row for row, _ in phases]
        self._rates = [[int(share * self._one) for share in shares] for _, shares in phases]

    def start(self, row: int = 0, taken: Sequence[int] | None = None) -> MixState:
        """Continue at `row`, where `taken` rows of each source were taken; without it the rows before are replayed."""
        if taken is not None:
            return MixState(self, row, taken)
        state = MixState(self, 0, [0] * len(self.names))
        state.take(row)
        return state

    def shares(self, row: int) -> list[float]:
        """Share of each source at this row; they sum to one."""
        phase = max(n for n, begin in enumerate(self._begins) if begin <= row)
        return [rate / self._one for rate in self._rates[phase]]

    def target(self, row: int) -> list[float]:
        """Rows due from each source when `row` rows are taken."""
        ends = [*self._begins[1:], row]
        return [
            sum(
                rates[source] * max(min(end, row) - begin, 0)
                for rates, begin, end in zip(self._rates, self._begins, ends, strict=True)
            )
            / self._one
            for source in range(len(self.names))
        ]

    def _row_when_due(self, source: int, units: int) -> float:
        """The smallest n with T(n) >= units for this source; infinite when there is none."""
        due = 0
        for phase, begin in enumerate(self._begins):
            rate = self._rates[phase][source]
            if rate:
                row = begin - (due - units) // rate  # rounds up
                if phase + 1 == len(self._begins) or row <= self._begins[phase + 1]:
                    return max(row, begin)
            if phase + 1 < len(self._begins):
                due += rate * (self._begins[phase + 1] - begin)
        return inf

    def window(self, source: int, taken: int) -> tuple[float, float]:
        """(first row that may be this source's next one, the row by which it must have been taken)."""
        units = taken * self._one
        return (
            self._row_when_due(source, units + self._slack) - 1,
            self._row_when_due(source, units + self._one - self._slack + 1),
        )


class MixState:
    """A position in a mixture.

    Attributes:
        row: rows taken so far.
        taken: rows taken from each source.
    """

    def __init__(self, mixture: Mixture, row: int, taken: Sequence[int]) -> None:
        assert len(taken) == len(mixture.names)
        assert sum(taken) == row
        self._mixture = mixture
        self.row = row
        self.taken = list(taken)
        windows = [mixture.window(source, count) for source, count in enumerate(taken)]
        self._release = [release for release, _ in windows]
        self._deadline = [deadline for _, deadline in windows]

    def take(self, rows: int) -> np.ndarray:
        """int64 [rows]: the source of each of the next rows."""
        if len(self.taken) == 1:
            self.row += rows
            self.taken[0] += rows
            return np.zeros(rows, np.int64)
        chosen = np.empty(rows, np.int64)
        release, deadline = self._release, self._deadline
        for number in range(rows):
            soonest = min(
                [(deadline[source], source) for source, first in enumerate(release) if first <= self.row],
            )
            source = soonest[1]
            chosen[number] = source
            self.taken[source] += 1
            self.row += 1
            release[source], deadline[source] = self._mixture.window(source, self.taken[source])
        return chosen


def _shares(names: Sequence[str], weights: Mapping[str, float]) -> list[Fraction]:
    if set(weights) != set(names):
        raise UserError(f"weights are given for {', '.join(weights)}; give one for each of {', '.join(names)}")
    for name, weight in weights.items():
        if not 0 <= weight < inf:
            raise UserError(f"the weight of source {name} is {weight}; it must be a number that is not negative")
    # Through the decimal text, so that 0.1 is a tenth.
    exact = [Fraction(str(weights[name])) for name in names]
    if not sum(exact):
        raise UserError(f"the weights of {', '.join(names)} are all 0; one must be positive")
    return [weight / sum(exact) for weight in exact]
