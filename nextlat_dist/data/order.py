"""The global order of a dataset: a pure function of (counts, seed, epoch, index).

The stream is epoch 0, epoch 1, … without end. Each epoch holds every record once; with `shuffle` the records are
permuted over the whole dataset and the documents inside each record. Positions count *units*: tokens for `packing:
concat`, documents for `packing: pad`.

Invariant: nothing here knows of ranks, batches or files, and a position is found by cumulative counts and binary
search, so starting at position 10^10 costs what starting at 0 costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def permutation(length: int, *key: int) -> np.ndarray:
    """int64 [length]: the permutation of 0 … length-1 that belongs to `key`.

    Sorts raw generator output: numpy promises that stream for ever, but not what `Generator.permutation` makes of it.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(raw, kind="stable")


@dataclass(frozen=True)
class Span:
    """Units `begin` to `end` (exclusive) of one record, in the document order of that epoch."""

    epoch: int
    record: int
    begin: int
    end: int


class GlobalOrder:
    """Order of a dataset whose record r holds `units[r]` units (int64 [records], not all zero)."""

    def __init__(self, units: np.ndarray, *, seed: int, shuffle: bool) -> None:
        self._units = units
        self._seed = seed
        self._shuffle = shuffle
        self.units_per_epoch = int(units.sum())
        assert self.units_per_epoch > 0
        # A batch touches two epochs at most times; one more for a reader that looks ahead.
        self._epoch = lru_cache(maxsize=3)(self._build_epoch)

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(records in order, int64 [records]; first unit of each, with the total appended, int64 [records + 1])."""
        count = len(self._units)
        records = permutation(count, self._seed, epoch, 0) if self._shuffle else np.arange(count)
        return records, np.concatenate([[0], np.cumsum(self._units[records])])

    def documents(self, epoch: int, record: int, count: int) -> np.ndarray | None:
        """Order of the `count` documents inside a record in this epoch; None means as stored."""
        return permutation(count, self._seed, epoch, 1, record) if self._shuffle and count > 1 else None

    def spans(self, begin: int, end: int) -> Iterator[Span]:
        """The stream's units `begin` to `end` (exclusive), in order, cut at record borders."""
        while begin < end:
            epoch, inside = divmod(begin, self.units_per_epoch)
            records, first = self._epoch(epoch)
            # The right side steps over records without units, which share their first unit with the next one.
            at = int(np.searchsorted(first, inside, side="right")) - 1
            take = min(int(first[at + 1]) - inside, end - begin)
            offset = inside - int(first[at])
            yield Span(epoch, int(records[at]), offset, offset + take)
            begin += take
