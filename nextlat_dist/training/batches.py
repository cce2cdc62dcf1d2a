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
from nextlat_dist.model.rows import pack_rows
from nextlat_dist.objective.terms import term_counts
from nextlat_dist.parallel.dims import ParallelDims, raise_together


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's share of one global batch."""

    micro_batches: list[torch.Tensor]  # rows [micro batch, s + 1, 4] each
    counts: torch.Tensor  # positions per loss term over the whole global batch, float64 [terms]
    losses: list[Lost]  # records first found damaged in this batch, by any reader
    digest: str  # SHA-256 of the whole global batch where hashes were asked for, on the readers


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
        self._shape = (rows, sequence_length + 1)
        self._micro_batch_size = micro_batch_size
        self._objective = objective
        self._device = device
        self._hashes = hashes

    def next(self) -> GlobalBatch:
        """Raises UserError on every rank when a reader fails on any."""
        losses: list[Lost] = []
        rows, counts, lost = self._exchange(methodcaller("next_batch"))
        while lost:
            found = self._new_losses()
            losses += found
            rows, counts, lost = self._exchange(methodcaller("again", found))
        return GlobalBatch(list(rows.split(self._micro_batch_size)), counts, losses, self._digest(rows))

    def _exchange(self, read: Callable[[RowLoader], RowBatch]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """This rank's rows [rows, s + 1, 4], counts [terms] over all ranks, and whether any reader lost a record."""
        error, flat = "", torch.zeros(4 * self._shape[0] * self._shape[1] + 2, dtype=torch.int32)
        if self.loader is not None:
            try:
                flat[:-2] = torch.from_numpy(_flatten(read(self.loader)))
                flat[-2] = len(self.loader.new_losses)
            except UserError as caught:
                error = str(caught)
            except Exception as caught:  # the others would wait for ever
                traceback.print_exc()
                error = f"reading the data failed on rank {self._dims.rank}: {type(caught).__name__}: {caught}"
            flat[-1] = bool(error)
        flat = flat.to(self._device)
        dist.broadcast(flat, src=self._dims.model_group_source, group=self._dims.model_group)
        rows = pack_rows(*flat[:-2].view(4, *self._shape))
        # What went wrong on a reader travels with the counts: one collective tells every rank.
        summary = torch.cat([term_counts(rows, self._objective), flat[-2:].double()])
        dist.all_reduce(summary, group=self._dims.data_group)
        if summary[-1] > 0:
            raise_together(error)
        return rows, summary[:-2], bool(summary[-2] > 0)

    def _new_losses(self) -> list[Lost]:
        """What all readers found damaged, in the order of their ranks. Collective."""
        found: list[list[Lost]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, self.loader.new_losses if self.loader is not None else [])
        return list(dict.fromkeys(loss for losses in found for loss in losses))

    def _digest(self, rows: torch.Tensor) -> str:
        if not self._hashes:
            return ""
        digests: list[list[bytes]] = [[]] * self._dims.data_size
        tokens, documents, loss_mask, labels = rows.cpu().to(torch.int32).numpy().transpose(2, 0, 1)
        batch = RowBatch(tokens, documents, loss_mask.astype(bool), labels)
        dist.all_gather_object(digests, batch.row_digests(), group=self._dims.data_group)
        return batch_digest([digest for mine in digests for digest in mine])


def _flatten(batch: RowBatch) -> np.ndarray:
    parts = (batch.tokens, batch.document_ids, batch.loss_mask, batch.targets)
    return np.concatenate([np.ascontiguousarray(part, dtype=np.int32).reshape(-1) for part in parts])
