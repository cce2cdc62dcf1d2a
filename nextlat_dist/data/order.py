"""The global order of a dataset: a pure function of (counts, seed, epoch, index).

The stream is epoch 0, epoch 1, … without end. Each epoch holds every record once. With `shuffle` the records are
permuted over the whole dataset, every `window_records` of them in that order make a window, and the documents are
permuted inside their window. Positions count *units*: tokens for `packing: concat`, documents for `packing: pad`.

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
class WindowPart:
    """Units `begin` to `end` (exclusive) of one window, in the document order of that epoch."""

    epoch: int
    window: int
    begin: int
    end: int


class GlobalOrder:
    """Order of a dataset whose record r holds `units[r]` units (int64 [records], not all zero)."""

    def __init__(self, units: np.ndarray, *, seed: int, shuffle: bool, window_records: int = 1) -> None:
        self._units = units
        self._seed = seed
        self._shuffle = shuffle
        self._window_records = window_records
        self.units_per_epoch = int(units.sum())
        assert self.units_per_epoch > 0
        # A batch touches two epochs at most times; one more for readers that look ahead.
        self._epoch = lru_cache(maxsize=3)(self._build_epoch)

    def _build_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(records in order, int64 [records]; first unit of each window, with the total appended)."""
        count = len(self._units)
        records = permutation(count, self._seed, epoch, 0) if self._shuffle else np.arange(count)
        ends = np.cumsum(self._units[records])
        size = self._window_records
        last_of_window = np.minimum(np.arange(size - 1, count + size - 1, size), count - 1)
        return records, np.concatenate([[0], ends[last_of_window]])

    def records(self, epoch: int, window: int) -> np.ndarray:
        """int64 [up to window_records]: the records of a window, in order."""
        records, _ = self._epoch(epoch)
        return records[window * self._window_records : (window + 1) * self._window_records]

    def documents(self, epoch: int, window: int, count: int) -> np.ndarray | None:
        """Order of the `count` documents inside a window in this epoch; None means as stored."""
        if not self._shuffle or count < 2:
            return None
        return permutation(count, self._seed, epoch, 1, int(self.records(epoch, window)[0]))

    def spans(self, begin: int, end: int) -> Iterator[WindowPart]:
        """The stream's units `begin` to `end` (exclusive), in order, cut at the borders of windows."""
        while begin < end:
            epoch, inside = divmod(begin, self.units_per_epoch)
            _, first = self._epoch(epoch)
            # The right side steps over windows without units, which share their first unit with the next one.
            window = int(np.searchsorted(first, inside, side="right")) - 1
            take = min(int(first[window + 1]) - inside, end - begin)
            offset = inside - int(first[window])
            yield WindowPart(epoch, window, offset, offset + take)
            begin += take
