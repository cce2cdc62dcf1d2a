"""Batches of rows from one or several sharded datasets, resumable to the row on any number of data-parallel ranks.

Invariant: global batch n is a pure function of (manifests, weights, seed, packing, sequence_length, window, lost
records, n · global_batch_size). A rank takes its slice of it; neither the number of ranks nor that of background
workers nor where a run was cut changes any batch. A resume seeks, it never replays.

    loader = RowLoader(Path("data/train"), sequence_length=512, packing="concat", global_batch_size=32, seed=0,
                       shuffle=True, data_parallel_rank=0, data_parallel_size=1)
    batch = loader.next_batch()
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nextlat_dist.data.integrity import Verify
from nextlat_dist.data.mixture import Mixture
from nextlat_dist.data.packing import RowBatch
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.stream import Packing, Rows, RowStream
from nextlat_dist.errors import UserError

__all__ = ["Cursor", "Lost", "RowBatch", "RowLoader", "Source"]

OnDamage = Literal["fail", "quarantine"]
ONLY_SOURCE = "train"  # the name of a dataset that is given alone


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture. `dataset` is a directory or URL with a `manifest.json`."""

    name: str
    dataset: Path | str
    weight: float = 1.0


@dataclass(frozen=True)
class Cursor:
    """Position in the stream of global rows; knows nothing of ranks or workers.

    Attributes:
        row: rows that all ranks together have taken.
        taken: rows of each source, by name; where it is empty they are counted again from the weights.
        quarantined: records of each source that padding stands for, by name.
    """

    row: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)
    quarantined: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        quarantined = {name: list(records) for name, records in self.quarantined.items()}
        return {"row": self.row, "taken": dict(self.taken), "quarantined": quarantined}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Cursor:
        return cls(int(raw["row"]), dict(raw["taken"]), dict(raw["quarantined"]))


@dataclass(frozen=True)
class Lost:
    """A record that could not be read and that padding stands for from now on."""

    source: str
    record: int
    reason: str


@dataclass(frozen=True)
class _Plan:
    """What one batch is made of: its first global row, rows taken of each source after it, and this rank's rows."""

    row: int
    taken_after: tuple[int, ...]
    ranges: tuple[tuple[int, int, np.ndarray], ...]  # (source, first row of its stream, positions in this rank's rows)


@dataclass(frozen=True)
class _Made:
    plan: _Plan
    batch: RowBatch
    parts: tuple[tuple[int, Rows], ...]


class RowLoader:
    """This rank's slice of the endless stream of global batches.

    Args:
        sources: directory or URL of a dataset, or several sources with weights.
        weight_changes: (row, weight of every source from that row on); rows increasing.
        sequence_length: predicted positions per row; a row holds `sequence_length + 1` tokens.
        packing: "concat" cuts the token stream into full rows, epoch after epoch without a gap; "pad" gives every
            document its own row, padded or cut to length.
        global_batch_size: rows of a global batch; divisible by `data_parallel_size`.
        seed: of the order; used with `shuffle` only.
        shuffle: permute records over the dataset and documents inside windows of records, differently every epoch.
        shuffle_window_records: records whose documents are shuffled together; a reader reads whole windows.
        cursor: where to continue.
        workers: threads that prepare batches ahead; 0 prepares each when it is asked for.
        vocab_size: of the model; every token id must be below it.
        tokenizer_sha256: of the tokenizer that the datasets must have been made with.
        verify: when to check the sha256 of whole shards; the crc32 of a record is checked whenever it is read.
        on_damage: "fail" stops at a damaged record; "quarantine" puts padding, which is no target, there.
        max_quarantined_fraction: of a source's tokens; more is an error.
        cache: where records of remote datasets are kept.

    Attributes:
        truncated_documents: documents this loader had to cut (`packing: pad`).
        cut: documents that had to be cut in the batch handed out last, and tokens of theirs that are in no row.
        new_losses: records first found damaged while making the batch handed out last.

    Raises:
        UserError: a dataset is missing, damaged, empty or not made for this tokenizer or vocabulary; bad batch
            arithmetic.
    """

    def __init__(
        self,
        sources: Path | str | Sequence[Source],
        *,
        sequence_length: int,
        packing: Packing,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        data_parallel_rank: int,
        data_parallel_size: int,
        weight_changes: Sequence[tuple[int, Mapping[str, float]]] = (),
        shuffle_window_records: int = 1,
        cursor: Cursor = Cursor(),
        workers: int = 0,
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
        verify: Verify = "first",
        on_damage: OnDamage = "fail",
        max_quarantined_fraction: float = 0.01,
        cache: CacheSettings | None = None,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size
        _require(sequence_length >= 1, f"sequence_length is {sequence_length}; it must be at least 1")
        _require(seed >= 0, f"seed is {seed}; it must not be negative")
        _require(packing in ("concat", "pad"), f"packing is {packing!r}; it must be 'concat' or 'pad'")
        _require(shuffle_window_records >= 1, f"shuffle_window_records is {shuffle_window_records}; the least is 1")
        _require(
            global_batch_size >= 1 and global_batch_size % data_parallel_size == 0,
            f"global_batch_size {global_batch_size} is not divisible by the data-parallel size {data_parallel_size}"
            "; change global_batch_size or the number of ranks",
        )
        if isinstance(sources, str | Path):
            sources = [Source(ONLY_SOURCE, sources)]
        self._mixture = Mixture({source.name: source.weight for source in sources}, weight_changes)
        _require(len(self._mixture.names) == len(sources), "two sources have the same name; name each differently")
        self._streams = [
            _open_stream(
                source,
                # Two sources of equal shape must not be shuffled alike.
                seed=seed if source.name == ONLY_SOURCE else zlib.crc32(source.name.encode(), seed & 0xFFFFFFFF),
                row_tokens=sequence_length + 1,
                packing=packing,
                shuffle=shuffle,
                window_records=shuffle_window_records,
                vocab_size=vocab_size,
                tokenizer_sha256=tokenizer_sha256,
                lost=cursor.quarantined.get(source.name, ()),
                verify=verify,
                tolerant=on_damage == "quarantine",
                cache=cache,
            )
            for source in sources
        ]
        _check_same_tokenizer(sources, self._streams)
        self._batch_rows = global_batch_size
        self._rank_rows = global_batch_size // data_parallel_size
        self._first_row = data_parallel_rank * self._rank_rows
        self._limit = max_quarantined_fraction
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="row-loader") if workers else None
        self._ahead: deque[Future[_Made]] = deque()
        self._depth = 2 * workers
        self._last: _Made | None = None
        self.truncated_documents = 0
        self.cut = (0, 0)
        self.new_losses: list[Lost] = []
        taken = [cursor.taken.get(name, 0) for name in self._mixture.names] if cursor.taken else None
        self._planned = self._mixture.start(cursor.row, taken)  # where the next batch to plan begins
        self._row, self._taken = cursor.row, tuple(self._planned.taken)  # where the next one to hand out begins

    @property
    def manifests(self) -> dict[str, Manifest]:
        """Manifest of each source, by name."""
        return dict(zip(self._mixture.names, (stream.manifest for stream in self._streams), strict=True))

    @property
    def cursor(self) -> Cursor:
        """Where the next global batch begins."""
        names = self._mixture.names
        quarantined = {name: sorted(s.lost) for name, s in zip(names, self._streams, strict=True) if s.lost}
        return Cursor(self._row, dict(zip(names, self._taken, strict=True)), quarantined)

    @property
    def rows_per_epoch(self) -> int:
        """Full rows of one pass over all sources."""
        return sum(stream.rows_per_epoch for stream in self._streams)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source in the rows that come next."""
        return dict(zip(self._mixture.names, self._mixture.shares(self._row), strict=True))

    def epochs(self) -> dict[str, float]:
        """Passes over each source so far."""
        sources = zip(self._mixture.names, self._streams, self._taken, strict=True)
        return {name: stream.epochs(rows) for name, stream, rows in sources}

    def next_batch(self) -> RowBatch:
        """Rows `[r · B/dp, (r + 1) · B/dp)` of the next global batch of B rows, for data-parallel rank r of dp.

        Raises:
            UserError: a record is damaged or holds a token id outside the vocabulary; the cursor then stays where it
                was.
        """
        try:
            made = self._next_made()
            batch = self._hand_out(made)
        except BaseException:
            self._ahead.clear()
            self._planned = self._mixture.start(self._row, self._taken)
            raise
        self._row, self._taken = made.plan.row + self._batch_rows, made.plan.taken_after
        return batch

    def again(self, losses: Sequence[Lost]) -> RowBatch:
        """The batch handed out last, with these records lost too. How ranks agree on what one of them found damaged.

        Raises:
            UserError: more of a source is lost than allowed.
        """
        assert self._last is not None
        self._lose(losses)
        return self._hand_out(self._last)

    def close(self) -> None:
        """End the background workers; a read that is under way is not waited for."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_made(self) -> _Made:
        if self._pool is None:
            return self._make(self._plan())
        while len(self._ahead) < self._depth:
            self._ahead.append(self._pool.submit(self._make, self._plan()))
        return self._ahead.popleft().result()

    def _plan(self) -> _Plan:
        """Plan the next batch: rows of one source in it are consecutive rows of that source's stream."""
        row, taken = self._planned.row, tuple(self._planned.taken)
        sources = self._planned.take(self._batch_rows)
        mine = sources[self._first_row : self._first_row + self._rank_rows]
        before = np.bincount(sources[: self._first_row], minlength=len(taken))
        ranges = [
            (source, taken[source] + int(before[source]), np.flatnonzero(mine == source))
            for source in np.unique(mine).tolist()
        ]
        return _Plan(row, tuple(self._planned.taken), tuple(ranges))

    def _make(self, plan: _Plan) -> _Made:
        parts = [
            (source, self._streams[source].rows(first, first + len(positions)))
            for source, first, positions in plan.ranges
        ]
        if len(parts) == 1:
            return _Made(plan, parts[0][1].batch, tuple(parts))
        names = ["tokens", "document_ids", "loss_mask"]
        if any(rows.batch.labels is not None for _, rows in parts):
            names.append("targets")
        arrays = []
        for name in names:
            pieces = [getattr(rows.batch, name) for _, rows in parts]
            whole = np.empty((self._rank_rows, pieces[0].shape[1]), pieces[0].dtype)
            for piece, (_, _, positions) in zip(pieces, plan.ranges, strict=True):
                whole[positions] = piece
            arrays.append(whole)
        return _Made(plan, RowBatch(*arrays), tuple(parts))

    def _hand_out(self, made: _Made) -> RowBatch:
        """Take note of what the batch lost; make it again where it holds a record that was lost since."""
        if any(not (s.lost.keys() & rows.records) <= rows.lost.keys() for s, rows in self._streams_of(made)):
            made = self._make(made.plan)
        names = self._mixture.names
        self.new_losses = [
            Lost(names[source], record, reason)
            for source, rows in made.parts
            for record, reason in sorted(rows.lost.items())
            if record not in self._streams[source].lost
        ]
        self._lose(self.new_losses)
        self.cut = sum(rows.truncated for _, rows in made.parts), sum(rows.cut_tokens for _, rows in made.parts)
        if self._last is None or made.plan.row != self._last.plan.row:
            self.truncated_documents += self.cut[0]
        self._last = made
        return made.batch

    def _streams_of(self, made: _Made) -> list[tuple[RowStream, Rows]]:
        return [(self._streams[source], rows) for source, rows in made.parts]

    def _lose(self, losses: Sequence[Lost]) -> None:
        for name, stream in zip(self._mixture.names, self._streams, strict=True):
            records = [loss.record for loss in losses if loss.source == name]
            if not records:
                continue
            stream.lose(records)
            _require(
                stream.lost_fraction <= self._limit,
                f"{len(stream.lost)} records with {stream.lost_fraction:.2%} of the tokens of source {name} are "
                f"damaged (the last: {losses[-1].reason}), more than data.max_quarantined_fraction={self._limit:g}; "
                "restore the data or raise that limit",
            )


def _open_stream(
    source: Source,
    *,
    row_tokens: int,
    packing: Packing,
    vocab_size: int | None,
    tokenizer_sha256: str | None,
    verify: Verify,
    tolerant: bool,
    cache: CacheSettings | None,
    **order: Any,
) -> RowStream:
    storage = open_storage(source.dataset, cache)
    manifest = read_manifest(storage)
    tokenizer, name = manifest.tokenizer, storage.url
    if tokenizer_sha256 is not None and tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"dataset {name} was made with tokenizer {tokenizer.sha256[:12]}…, not with {tokenizer_sha256[:12]}…; "
            "shard it again with this tokenizer or train with the dataset's own"
        )
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer of dataset {name} has {tokenizer.vocab_size} ids, but the model's vocab_size is "
            f"{vocab_size}; set vocab_size to at least {tokenizer.vocab_size}"
        )
    if (manifest.tokens < row_tokens and packing == "concat") or not manifest.documents:
        raise UserError(
            f"dataset {name} has {manifest.tokens} tokens in {manifest.documents} documents, too few for one row of "
            f"sequence_length + 1 = {row_tokens} tokens; use more data or a smaller sequence_length"
        )
    records = Records(storage, manifest, verify=verify, tolerant=tolerant)
    return RowStream(
        records,
        manifest,
        row_tokens=row_tokens,
        packing=packing,
        vocab_size=vocab_size or tokenizer.vocab_size,
        tolerant=tolerant,
        **order,
    )


def _check_same_tokenizer(sources: Sequence[Source], streams: Sequence[RowStream]) -> None:
    first = streams[0].manifest.tokenizer.sha256
    for source, stream in zip(sources, streams, strict=True):
        other = stream.manifest.tokenizer.sha256
        _require(
            other == first,
            f"source {source.name} was made with tokenizer {other[:12]}…, source {sources[0].name} with "
            f"{first[:12]}…; shard one of them again with the other's tokenizer",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
