"""The data of a run: from the `data` section to batches on every rank, and whether a resume still has the same data."""

from __future__ import annotations

from pathlib import Path

import torch

from nextlat_dist.config.schema import DataConfig, RunConfig
from nextlat_dist.data.integrity import cache_home
from nextlat_dist.data.loader import Cursor, RowLoader, Source
from nextlat_dist.data.members import read_tokenizer
from nextlat_dist.data.mixture import Mixture
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.dims import ParallelDims, raise_together
from nextlat_dist.training.batches import BatchSource
from nextlat_dist.training.loop import ValidationSet
from nextlat_dist.training.state.saving import TrainerState


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


def check_same_weights(now: DataConfig, saved: DataConfig, state: TrainerState) -> None:
    """That every source of the run is still there and had the same weights up to the checkpoint.

    Sources may be added and weights may change from the checkpoint on.

    Raises:
        UserError: a source is gone, or a weight of the past is another one.
    """
    row = Cursor.from_json(state.cursor).row
    gone = set(state.datasets) - {source.name for source in now.train_sources}
    if gone:
        raise UserError(
            f"source {min(gone)}, which this run was trained on, is gone from data.sources; put it back (its weight "
            f"may become 0 with a data.weight_changes entry at {row * now.sequence_length:,} tokens or later) or use "
            "another output_dir"
        )
    before, after = _past_shares(saved, row), _past_shares(now, row)
    if before != after:
        raise UserError(
            f"the weights of data.sources up to row {row:,} are not those that this run was trained with ({before}, "
            f"now {after}); restore them, and change weights with a data.weight_changes entry at "
            f"{row * now.sequence_length:,} tokens or later"
        )


def check_same_datasets(state: TrainerState, loader: RowLoader | None) -> None:
    """That the sources are the datasets that the run was trained on. Collective.

    Raises:
        UserError: on every rank, when one is another.
    """
    manifests = loader.manifests if loader is not None else {}
    errors = [
        f"source {name} is not the dataset this run was trained on (manifest {manifests[name].digest[:12]}…, "
        f"checkpoint {digest[:12]}…); restore data.train or data.sources, or use another output_dir"
        for name, digest in state.datasets.items()
        if name in manifests and manifests[name].digest != digest
    ]
    raise_together(errors[0] if errors else "")


def _past_shares(data: DataConfig, row: int) -> dict[int, dict[str, float]]:
    """{first row: {source: share}} of every phase that began before `row`, sources without a share left out."""
    mixture = Mixture({source.name: source.weight for source in data.train_sources}, data.weight_changes_by_row)
    begins = [0, *(begin for begin, _ in data.weight_changes_by_row)]
    return {
        begin: {name: share for name, share in zip(mixture.names, mixture.shares(begin), strict=True) if share}
        for begin in begins
        if begin < row
    }


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


def validation_set(
    config: RunConfig, dims: ParallelDims, loader: RowLoader | None, device: torch.device
) -> ValidationSet:
    """Up to `training.validation_batches` global batches, no more than the dataset has. Collective."""
    batches = torch.zeros(1, dtype=torch.int64)
    if loader is not None:
        whole = max(1, loader.rows_per_epoch // config.training.global_batch_size)
        batches[0] = min(config.training.validation_batches, whole)
    batches = batches.to(device)
    torch.distributed.broadcast(batches, src=dims.model_group_source, group=dims.model_group)
    return ValidationSet(batch_source(config, dims, loader, device), int(batches))
