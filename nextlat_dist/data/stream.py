"""The endless rows of one dataset.

Invariant: row k is a pure function of (manifest, seed, packing, row_tokens, window, lost records, k). A lost record
keeps its position in the order, filled with padding, so that losing it moves no other token.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nextlat_dist.data.order import GlobalOrder, WindowPart
from nextlat_dist.data.packing import ArrangedDocuments, RowBatch, arrange, concat_rows, pad_rows, tokens_cut_off
from nextlat_dist.data.records import DamagedRecord, Records
from nextlat_dist.data.shard_format import Manifest
from nextlat_dist.errors import UserError

Packing = Literal["concat", "pad"]
CACHED_TOKENS = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Rows of one stream and what they were made of.

    Attributes:
        batch: the rows.
        records: every record that the rows needed, whether or not it could be read.
        lost: those of them that were replaced by padding, with the reason.
        truncated: documents that were cut to the length of a row (`packing: pad`).
        cut_tokens: tokens of theirs that are in no row.
    """

    batch: RowBatch
    records: frozenset[int]
    lost: dict[int, str]
    truncated: int
    cut_tokens: int


@dataclass(frozen=True)
class _Window:
    block: ArrangedDocuments
    records: tuple[int, ...]
    lost: dict[int, str]


class RowStream:
    """Rows of a dataset, in the order of `GlobalOrder`; may be read by several threads.

    Args:
        row_tokens: tokens of a row, `sequence_length + 1`.
        vocab_size: every token id must be below it.
        lost: records not to read.
        tolerant: replace a damaged record by padding; otherwise it is an error.
    """

    def __init__(
        self,
        records: Records,
        manifest: Manifest,
        *,
        row_tokens: int,
        packing: Packing,
        seed: int,
        shuffle: bool,
        window_records: int,
        vocab_size: int,
        lost: Iterable[int] = (),
        tolerant: bool = False,
    ) -> None:
        self.manifest = manifest
        self.lost = dict.fromkeys(lost, "lost before")
        self._records = records
        self._row_tokens = row_tokens
        self._packing = packing
        self._vocab_size = vocab_size
        self._tolerant = tolerant
        self._pad_id = max(manifest.tokenizer.pad_id, 0)
        units = records.tokens if packing == "concat" else records.documents
        self._order = GlobalOrder(units, seed=seed, shuffle=shuffle, window_records=window_records)
        self._windows: OrderedDict[tuple[int, int], Future[_Window]] = OrderedDict()
        largest = max(int(records.tokens.max()) * window_records, 1)
        self._cached_windows = int(np.clip(CACHED_TOKENS // largest, 4, 256))
        self._lock = threading.Lock()

    @property
    def rows_per_epoch(self) -> int:
        """Full rows of one pass (`concat`: the rest of an epoch flows into the next one)."""
        concat = self._packing == "concat"
        return self.manifest.tokens // self._row_tokens if concat else self.manifest.documents

    def epochs(self, rows: int) -> float:
        """Passes over the dataset that so many rows take."""
        return rows * (self._row_tokens if self._packing == "concat" else 1) / self._order.units_per_epoch

    def rows(self, begin: int, end: int) -> Rows:
        """Rows `begin` to `end` (exclusive) of the stream.

        Raises:
            UserError: a record cannot be read, or holds a token id outside the vocabulary.
        """
        scale = self._row_tokens if self._packing == "concat" else 1
        spans = list(self._order.spans(begin * scale, end * scale))
        windows = [self._window(span) for span in spans]
        pieces = [(window.block, span.begin, span.end) for window, span in zip(windows, spans, strict=True)]
        truncated = cut_tokens = 0
        if self._packing == "concat":
            batch = concat_rows(pieces, self._row_tokens, self._pad_id)
        else:
            batch, truncated = pad_rows(pieces, self._row_tokens, self._pad_id)
            cut_tokens = tokens_cut_off(pieces, self._row_tokens)
        records = frozenset(record for window in windows for record in window.records)
        return Rows(batch, records, {k: v for window in windows for k, v in window.lost.items()}, truncated, cut_tokens)

    def lose(self, records: Iterable[int]) -> None:
        """From now on, replace these records by padding."""
        with self._lock:
            self.lost.update({record: "lost before" for record in records if record not in self.lost})
            for key, window in list(self._windows.items()):
                if not window.done() or not self.lost.keys().isdisjoint(window.result().records):
                    del self._windows[key]

    def describe(self, record: int) -> str:
        return self._records.describe(record)

    @property
    def lost_fraction(self) -> float:
        """Share of the dataset's tokens in records that are known to be lost."""
        return float(self._records.tokens[list(self.lost)].sum()) / self.manifest.tokens

    def _window(self, span: WindowPart) -> _Window:
        """The documents of a span's window; the last few are kept, since rows and batches end inside windows."""
        key = (span.epoch, span.window)
        with self._lock:
            future = self._windows.get(key)
            mine = future is None
            if future is None:
                future = self._windows[key] = Future()
                while len(self._windows) > self._cached_windows:
                    self._windows.popitem(last=False)
            self._windows.move_to_end(key)
        if mine:
            try:
                future.set_result(self._read_window(*key))
            except BaseException as error:
                with self._lock:
                    if self._windows.get(key) is future:
                        del self._windows[key]
                future.set_exception(error)
        return future.result()

    def _read_window(self, epoch: int, window: int) -> _Window:
        numbers: Sequence[int] = self._order.records(epoch, window).tolist()
        records, lost = [], {}
        for number in numbers:
            if number in self.lost:
                lost[number] = self.lost[number]
                continue
            try:
                record = self._records.read(number)
            except DamagedRecord as error:
                if not self._tolerant:
                    raise
                lost[number] = str(error)
                continue
            largest = max(int(ids.max()) for ids in (record.tokens, record.labels) if ids is not None)
            if largest >= self._vocab_size:
                raise UserError(
                    f"{self._records.describe(number)} holds token id {largest}, but the vocabulary has "
                    f"{self._vocab_size} ids; set vocab_size to the tokenizer's or shard the data again"
                )
            records.append(record)
        count = sum(len(record.ends) for record in records)
        return _Window(arrange(records, self._order.documents(epoch, window, count)), tuple(numbers), lost)
