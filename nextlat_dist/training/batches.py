"""Global batches on every rank: one reader per model-parallel group, broadcast to the rest, counted over the global
batch.

A read error on any reader becomes the same error on every rank, instead of a hang; a record that one reader finds
damaged is lost for all of them. A batch can be prepared while a GPU works on the one before: read, copied, sent round,
counted on a stream of its own; whoever takes it then finds its numbers on the host.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import methodcaller

import numpy as np
import torch
import torch.distributed as dist

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.data.loader import Cursor, Lost, RowBatch, RowLoader
from nextlat_dist.data.packing import batch_digest
from nextlat_dist.errors import UserError
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.terms import number_of_terms, term_counts
from nextlat_dist.parallel.dims import ParallelDims, raise_together


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's share of one global batch."""

    micro_batches: list[Batch]
    counts: torch.Tensor  # positions per loss term over the whole global batch, float64 [terms], on the host
    losses: list[Lost]  # records first found damaged in this batch, by any reader
    digest: str  # SHA-256 of the whole global batch where hashes were asked for, on the readers
    cut_documents: int = 0  # documents of the global batch that were cut to the length of a row (`packing: pad`)
    cut_tokens: int = 0  # tokens of theirs that are in no row
    real_tokens: int = 0  # tokens of the global batch, without padding
    attended: int = 0  # keys that its tokens attend to, all together


@dataclass(frozen=True)
class _Summary:
    """What is added up over all ranks after every read, in one collective: counts, and what else there is to know."""

    counts: torch.Tensor  # float64 [terms]
    lost: int  # records found damaged
    failed: int  # readers that failed
    cut_documents: int
    cut_tokens: int
    real_tokens: int
    attended: int
    documents: int  # of this rank alone: no micro-batch of its has more

    @classmethod
    def of(cls, values: torch.Tensor, terms: int) -> _Summary:
        """From values [terms + 7] on the host, in the order of the fields."""
        counts, numbers = values[:terms], values[terms:].tolist()
        return cls(counts, *(int(number) for number in numbers))


class _Parcel:
    """What a reader sends to its model group in one broadcast: the parts of a batch, and a few numbers."""

    _NUMBERS = ("first_row", "lost", "failed", "cut_documents", "cut_tokens")

    def __init__(self, rows: int, width: int, pinned: bool) -> None:
        size = 4 * rows * width + 2 * len(self._NUMBERS)
        self.buffer = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._shape = (4, rows, width)

    @property
    def parts(self) -> torch.Tensor:
        """Tokens, document ids, loss mask and labels: int32 [4, rows, s + 1]."""
        return self.buffer[: -2 * len(self._NUMBERS)].view(self._shape)

    @property
    def _numbers(self) -> torch.Tensor:
        return self.buffer[-2 * len(self._NUMBERS) :].view(torch.int64)

    def number(self, name: str) -> torch.Tensor:
        return self._numbers[self._NUMBERS.index(name)]

    def set_number(self, name: str, value: int) -> None:
        self._numbers[self._NUMBERS.index(name)] = value

    def fill(self, batch: RowBatch) -> None:
        for part, values in zip(self.parts, _parts(batch), strict=True):
            part.copy_(torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)))

    def batch(self) -> Batch:
        tokens, document_ids, loss_mask, labels = self.parts
        return Batch.of(tokens, document_ids, loss_mask, labels, self.number("first_row"))


class BatchSource:
    """`next()` gives every rank its share of the next global batch. Collective."""

    def __init__(
        self,
        loader: RowLoader | None,
        dims: ParallelDims,
        *,
        rows: int,
        micro_batch_size: int,
        sequence_length: int,
        objective: ObjectiveConfig,
        device: torch.device,
        hashes: bool = False,
    ) -> None:
        """`loader` on the model group's first rank, None elsewhere; `rows` per data-parallel rank and global batch."""
        assert (loader is not None) == (dims.rank == dims.model_group_source)
        self.loader = loader
        self._dims = dims
        self._rows, self._width = rows, sequence_length + 1
        self._micro_batch_size = micro_batch_size
        self._objective = objective
        self._device = device
        self._hashes = hashes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prepared: _Prepared | None = None
        self._progress = self._progress_now()

    @property
    def progress(self) -> Progress | None:
        """On a reader: where the next batch begins."""
        return self._progress if self._prepared is not None else self._progress_now()

    def _progress_now(self) -> Progress | None:
        loader = self.loader
        return None if loader is None else Progress(loader.cursor, loader.epochs(), loader.shares)

    def prepare(self) -> None:
        """Begin with the next batch, while the device works. Collective; what goes wrong is said in `next`."""
        if self._prepared is None:
            self._progress = self._progress_now()
            first_row = self._first_row()
            self._prepared = self._begin(methodcaller("next_batch"), first_row)

    def next(self) -> GlobalBatch:
        """Raises UserError on every rank when a reader fails on any."""
        losses: list[Lost] = []
        self.prepare()
        prepared, self._prepared = self._prepared, None
        assert prepared is not None
        summary = self._finish(prepared)
        while summary.lost > 0:
            found = self._new_losses()
            losses += found
            prepared = self._begin(methodcaller("again", found), prepared.first_row)
            summary = self._finish(prepared)
        # A power of two, so that the shapes of a run are few.
        documents = 1 << (summary.documents - 1).bit_length()
        micro_batches = replace(prepared.batch, documents=documents).split(self._micro_batch_size)
        return GlobalBatch(
            micro_batches,
            summary.counts,
            losses,
            self._digest(prepared.rows),
            cut_documents=summary.cut_documents,
            cut_tokens=summary.cut_tokens,
            real_tokens=summary.real_tokens,
            attended=summary.attended,
        )

    def _first_row(self) -> int:
        """Number of this data-parallel rank's first row of the next batch, on a reader."""
        return 0 if self.loader is None else self.loader.cursor.row + self._dims.data_rank * self._rows

    def _begin(self, read: Callable[[RowLoader], RowBatch], first_row: int) -> _Prepared:
        """One batch, read on the readers, broadcast and counted; nothing here waits for the device."""
        error, rows, parcel = "", None, _Parcel(self._rows, self._width, pinned=self._stream is not None)
        if self.loader is not None:
            try:
                rows = read(self.loader)
                parcel.fill(rows)
                parcel.set_number("first_row", first_row)
                parcel.set_number("lost", len(self.loader.new_losses))
                parcel.set_number("cut_documents", self.loader.cut[0])
                parcel.set_number("cut_tokens", self.loader.cut[1])
            except UserError as caught:
                error = str(caught)
            except Exception as caught:  # the others would wait for ever
                traceback.print_exc()
                error = f"reading the data failed on rank {self._dims.rank}: {type(caught).__name__}: {caught}"
            parcel.set_number("failed", int(bool(error)))
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            parcel.buffer = parcel.buffer.to(self._device, non_blocking=True)
            dist.broadcast(parcel.buffer, src=self._dims.model_group_source, group=self._dims.model_group)
            batch = parcel.batch()
            if self._objective.semantics == "release":
                batch = batch.as_released()
            values = self._count(parcel, batch)
            ready = self._stream.record_event() if self._stream is not None else None
        return _Prepared(batch, values, ready, rows, first_row, error)

    def _count(self, parcel: _Parcel, batch: Batch) -> torch.Tensor:
        """What `_Summary` is made of, on its way to the host. What went wrong on a reader travels with the counts: one
        collective tells every rank.
        """
        numbers = [parcel.number(name) for name in ("lost", "failed", "cut_documents", "cut_tokens")]
        numbers += [batch.real_tokens, batch.attended]
        values = torch.cat([term_counts(batch, self._objective, self._micro_batch_size), torch.stack(numbers).double()])
        dist.all_reduce(values, group=self._dims.data_group)
        values = torch.cat([values, batch.most_documents(self._micro_batch_size).double()[None]])
        if self._stream is None:
            return values
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def _finish(self, prepared: _Prepared) -> _Summary:
        if prepared.ready is not None:
            prepared.ready.synchronize()
            current = torch.cuda.current_stream(self._device)
            current.wait_event(prepared.ready)
            prepared.batch.message.record_stream(current)
        summary = _Summary.of(prepared.values, number_of_terms(self._objective))
        if summary.failed > 0:
            raise_together(prepared.error)
        return summary

    def _new_losses(self) -> list[Lost]:
        """What all readers found damaged, in the order of their ranks. Collective."""
        found: list[list[Lost]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, self.loader.new_losses if self.loader is not None else [])
        return list(dict.fromkeys(loss for losses in found for loss in losses))

    def _digest(self, rows: RowBatch | None) -> str:
        """Of the whole global batch, on the readers: they are a data-parallel group."""
        if not self._hashes or rows is None:
            return ""
        digests: list[list[bytes]] = [[]] * self._dims.data_size
        dist.all_gather_object(digests, rows.row_digests(), group=self._dims.data_group)
        return batch_digest([digest for mine in digests for digest in mine])


@dataclass(frozen=True)
class Progress:
    """Where a loader is: its cursor, passes over each source, and each source's share of the rows to come."""

    cursor: Cursor
    epochs: dict[str, float]
    shares: dict[str, float]


@dataclass(frozen=True)
class _Prepared:
    batch: Batch
    values: torch.Tensor  # of the `_Summary`, on the host once it is `ready`
    ready: torch.cuda.Event | None
    rows: RowBatch | None  # as the loader gave them, on a reader
    first_row: int
    error: str  # of this reader


def _parts(batch: RowBatch) -> tuple[np.ndarray, ...]:
    return batch.tokens, batch.document_ids, batch.loss_mask, batch.targets
