"""Validation: the same batches every time, and the loss terms over all of them together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import RowLoader
from nextlat_dist.objective.terms import named_terms
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.reporting.log import logger
from nextlat_dist.training.batches import BatchSource
from nextlat_dist.training.cut_documents import Count
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.open_data import batch_source

log = logger(__name__)


class ValidationSet:
    """The first rows of the validation dataset in stored order, kept in memory."""

    def __init__(self, source: BatchSource, batches: int) -> None:
        self._batches = [source.next() for _ in range(batches)]

    def cut(self, rows: int) -> Count:
        """What `packing: pad` cut of these batches of so many documents."""
        count = Count()
        for batch in self._batches:
            count.add(rows, batch)
        return count

    def evaluate(
        self, engine: Engine, config: RunConfig, dims: ParallelDims, tokens: int = 0
    ) -> dict[str, float | None]:
        """Loss terms over all batches together, each a mean over what counts, after so many tokens. Collective."""
        sums: Any = 0
        counts: Any = 0
        for batch in self._batches:
            sums = sums + engine.evaluate(batch.micro_batches)
            counts = counts + batch.counts
        return named_terms(_over_all_ranks(sums, dims), counts, config.objective, tokens)


def validation_set(
    config: RunConfig, dims: ParallelDims, loader: RowLoader | None, device: torch.device
) -> ValidationSet:
    """Up to `training.validation_batches` global batches, no more than the dataset has. Collective."""
    batches = torch.zeros(1, dtype=torch.int64)
    if loader is not None:
        whole = max(1, loader.rows_per_epoch // config.training.global_batch_size)
        batches[0] = min(config.training.validation_batches, whole)
    batches = batches.to(device)
    dist.broadcast(batches, src=dims.model_group_source, group=dims.model_group)
    validation = ValidationSet(batch_source(config, dims, loader, device), int(batches))
    cut = validation.cut(config.training.global_batch_size)
    if cut.cut and dims.rank == 0:
        log.warning("%s", cut.sentence("the validation batches", config.data.sequence_length))
    return validation


def _over_all_ranks(sums: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Global term sums from every rank's; tensor-parallel ranks all hold the same ones."""
    group = dist.group.WORLD
    assert group is not None
    return all_reduce_sum(sums.clone(), group) / dims.tensor_size
