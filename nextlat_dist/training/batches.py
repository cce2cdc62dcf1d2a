"""Global batches on every rank: one reader per model-parallel group, broadcast to the rest, counted over the global
batch.

A read error on any reader becomes the same error on every rank, instead of a hang.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from nextlat_dist.data.loader import RowBatch, RowLoader
from nextlat_dist.errors import UserError
from nextlat_dist.model.embedding import pack_rows
from nextlat_dist.objective.masks import term_counts
from nextlat_dist.parallel.dims import ParallelDims, raise_together


@dataclass(frozen=True)
class GlobalBatch:
    """This data-parallel rank's share of one global batch."""

    micro_batches: list[torch.Tensor]  # rows [micro batch, s + 1, 3] each
    counts: torch.Tensor  # positions per loss term over the whole global batch, float64 [1 + 2d]


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
        rollout_steps: int,
        device: torch.device,
    ) -> None:
        """`loader` on the model group's first rank, None elsewhere; `rows` per data-parallel rank and global batch."""
        assert (loader is not None) == (dims.rank == dims.model_group_source)
        self.loader = loader
        self._dims = dims
        self._shape = (rows, sequence_length + 1)
        self._micro_batch_size = micro_batch_size
        self._rollout_steps = rollout_steps
        self._device = device

    def next(self) -> GlobalBatch:
        error, flat = "", torch.zeros(3 * self._shape[0] * self._shape[1] + 1, dtype=torch.int32)
        if self.loader is not None:
            try:
                flat[:-1] = torch.from_numpy(_flatten(self.loader.next_batch()))
            except UserError as caught:
                error = str(caught)
                flat[-1] = 1
        flat = flat.to(self._device)
        dist.broadcast(flat, src=self._dims.model_group_source, group=self._dims.model_group)
        tokens, documents, loss_mask = flat[:-1].view(3, *self._shape)
        rows = pack_rows(tokens, documents, loss_mask)
        # The flag of a failed reader travels with the counts: one collective tells every rank.
        failed = flat[-1:].double()
        summary = torch.cat([term_counts(rows, self._rollout_steps), failed])
        dist.all_reduce(summary, group=self._dims.data_group)
        if summary[-1] > 0:
            raise_together(error)
        return GlobalBatch(list(rows.split(self._micro_batch_size)), summary[:-1])


def _flatten(batch: RowBatch) -> np.ndarray:
    parts = (batch.tokens, batch.document_ids, batch.loss_mask)
    return np.concatenate([np.ascontiguousarray(part, dtype=np.int32).reshape(-1) for part in parts])
