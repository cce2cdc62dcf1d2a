"""Global batches on every rank: one reader per model-parallel group, broadcast to the rest, counted over the global
batch.

A read error on any reader becomes the same error on every rank, instead of a hang; a record that one reader finds
damaged is lost for all of them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller

import numpy as np
import torch
import torch.distributed as dist

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.data.loader import Lost, RowBatch, RowLoader
from nextlat_dist.data.packing import batch_digest
from nextlat_dist.errors import UserError
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.terms import term_counts
from nextlat_dist.parallel.dims import ParallelDims, raise_together


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's share of one global batch."""

    micro_batches: list[Batch]
    counts: torch.Tensor  # positions per loss term over the whole global batch, float64 [terms]
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

    @classmethod
    def over(cls, group: dist.ProcessGroup, counts: torch.Tensor, *numbers: torch.Tensor) -> _Summary:
        """`numbers`: of this rank, in the order of the fields. Read in one piece: a GPU is asked once."""
        values = torch.cat([counts, torch.stack(numbers).double()])
        dist.all_reduce(values, group=group)
        return cls(values[: len(counts)], *(int(number) for number in values[len(counts) :].tolist()))


class _Parcel:
    """What a reader sends to its model group in one broadcast: the parts of a batch, and a few numbers."""

    _NUMBERS = ("first_row", "lost", "failed", "cut_documents", "cut_tokens")

    def __init__(self, rows: int, width: int) -> None:
        self.buffer = torch.zeros(4 * rows * width + 2 * len(self._NUMBERS), dtype=torch.int32)
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

    def next(self) -> GlobalBatch:
        """Raises UserError on every rank when a reader fails on any."""
        losses: list[Lost] = []
        first_row = self._first_row()
        read = self._exchange(methodcaller("next_batch"), first_row)
        while read.summary.lost > 0:
            found = self._new_losses()
            losses += found
            read = self._exchange(methodcaller("again", found), first_row)
        micro_batches = read.batch.split(self._micro_batch_size)
        summary = read.summary
        return GlobalBatch(
            micro_batches,
            summary.counts,
            losses,
            self._digest(read.rows),
            cut_documents=summary.cut_documents,
            cut_tokens=summary.cut_tokens,
            real_tokens=summary.real_tokens,
            attended=summary.attended,
        )

    def _first_row(self) -> int:
        """Number of this data-parallel rank's first row of the next batch, on a reader."""
        return 0 if self.loader is None else self.loader.cursor.row + self._dims.data_rank * self._rows

    def _exchange(self, read: Callable[[RowLoader], RowBatch], first_row: int) -> _Read:
        """One batch, read on the readers and broadcast."""
        error, rows, parcel = "", None, _Parcel(self._rows, self._width)
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
        parcel.buffer = parcel.buffer.to(self._device)
        dist.broadcast(parcel.buffer, src=self._dims.model_group_source, group=self._dims.model_group)
        batch = parcel.batch()
        # What went wrong on a reader travels with the counts: one collective tells every rank.
        summary = _Summary.over(
            self._dims.data_group,
            term_counts(batch, self._objective),
            *(parcel.number(name) for name in ("lost", "failed", "cut_documents", "cut_tokens")),
            batch.real_tokens,
            batch.attended,
        )
        if summary.failed > 0:
            raise_together(error)
        return _Read(batch, summary, rows)

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
class _Read:
    batch: Batch
    summary: _Summary
    rows: RowBatch | None  # as the loader gave them, on a reader


def _parts(batch: RowBatch) -> tuple[np.ndarray, ...]:
    return batch.tokens, batch.document_ids, batch.loss_mask, batch.targets
