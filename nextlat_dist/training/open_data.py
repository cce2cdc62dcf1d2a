"""The data of a run: from the `data` section to batches on every rank."""

from __future__ import annotations

from pathlib import Path

import torch

from nextlat_dist.config.schema import DataConfig, RunConfig
from nextlat_dist.data.integrity import cache_home
from nextlat_dist.data.loader import Cursor, RowLoader, Source
from nextlat_dist.data.members import read_tokenizer
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.dims import ParallelDims, raise_together
from nextlat_dist.training.batches import BatchSource


def open_training_data(config: RunConfig, dims: ParallelDims, cursor: Cursor) -> RowLoader | None:
    """The loader on the model group's first rank, None on the others. Collective.

    Raises:
        UserError: on every rank, when any reader finds something wrong.
    """
    sources = [Source(source.name, source.path, source.weight) for source in config.data.train_sources]
    return _open(config, dims, sources, config.data, cursor)


def open_validation_data(config: RunConfig, dims: ParallelDims) -> RowLoader | None:
    """As `open_training_data`, for `data.validation`: stored order, damage is an error. Collective."""
    assert config.data.validation is not None
    return _open(config, dims, [Source("validation", config.data.validation)], None, Cursor())


def _open(
    config: RunConfig, dims: ParallelDims, sources: list[Source], training: DataConfig | None, cursor: Cursor
) -> RowLoader | None:
    """`training`: the settings that concern training data only."""
    loader, error = None, ""
    if dims.rank == dims.model_group_source:
        data = config.data
        try:
            loader = RowLoader(
                sources,
                sequence_length=data.sequence_length,
                packing=data.packing,
                global_batch_size=config.training.global_batch_size,
                seed=config.training.seed,
                shuffle=training is not None and training.shuffle,
                data_parallel_rank=dims.data_rank,
                data_parallel_size=dims.data_size,
                weight_changes=training.weight_changes_by_row if training is not None else (),
                shuffle_window_records=data.shuffle_window_records,
                cursor=cursor,
                workers=training.workers if training is not None else 0,
                vocab_size=config.model.vocab_size,
                tokenizer_sha256=Tokenizer(Path(data.tokenizer)).sha256 if data.tokenizer else None,
                verify=data.verify,
                on_damage=training.on_damage if training is not None else "fail",
                max_quarantined_fraction=data.max_quarantined_fraction,
                cache=_cache(data),
            )
        except UserError as caught:
            error = str(caught)
    raise_together(error)
    return loader


def _cache(data: DataConfig) -> CacheSettings | None:
    directory = Path(data.cache_dir) if data.cache_dir else cache_home() / "records"
    return CacheSettings(directory, data.cache_bytes) if data.cache_bytes else None


def tokenizer_model(config: RunConfig, loader: RowLoader | None) -> bytes | None:
    """Content of the tokenizer that all training sources were made with, on ranks with a loader. Collective.

    Raises:
        UserError: on every rank, when it is gone or another one.
    """
    model, error = None, ""
    if loader is not None:
        source = config.data.train_sources[0]
        try:
            model = read_tokenizer(open_storage(source.path), loader.manifests[source.name])
        except UserError as caught:
            error = str(caught)
    raise_together(error)
    return model


def batch_source(config: RunConfig, dims: ParallelDims, loader: RowLoader | None, device: torch.device) -> BatchSource:
    return BatchSource(
        loader,
        dims,
        rows=config.training.global_batch_size // dims.data_size,
        micro_batch_size=config.training.micro_batch_size,
        sequence_length=config.data.sequence_length,
        objective=config.objective,
        device=device,
        hashes=config.data.log_batch_hashes,
    )
