"""Resuming a run: which checkpoint, whether it is of this run and its data, and the state that it holds.

A resume at the same topology continues bit-identically; any other topology can read the same state. The learning rate
needs no state: it is a function of tokens.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nextlat_dist.checkpoint.commit import committed, find_checkpoint, step_of, verify_together
from nextlat_dist.checkpoint.rng import load_rng
from nextlat_dist.checkpoint.tensors import TensorReader
from nextlat_dist.config.load import config_to_dict
from nextlat_dist.config.schema import DataConfig, RunConfig
from nextlat_dist.data.loader import Cursor, RowLoader
from nextlat_dist.data.mixture import Mixture
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.dims import ParallelDims, raise_together
from nextlat_dist.reporting.log import logger
from nextlat_dist.training.engine.master_state import load_state
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.state.trainer_state import TrainerState, read_state, saved_config

log = logger(__name__)

# What decides which rows a run reads and in which order, beyond its datasets, their order and their weights
# (`check_same_datasets`, `check_same_weights`): with another value a cursor means other rows, so that a resume would
# repeat some and skip others. `tests/training/state/test_stream_keys.py` asks of every setting of the loader whether it
# belongs here.
STREAM_KEYS = {
    "data": ("sequence_length", "packing", "shuffle", "shuffle_window_records"),
    "training": ("global_batch_size", "seed"),
}


def find_resumable(config: RunConfig, dims: ParallelDims, root: Path) -> Path | None:
    """The newest checkpoint under `root` that every rank finds whole; None when there is none and none is required.

    Collective.

    Raises:
        UserError: nothing to resume though `checkpoint.resume=must`; nothing whole; another model.
    """
    if config.checkpoint.resume == "never":
        return None
    found: list[Any] = [[], ""]
    if dims.rank == 0:
        try:
            found = [_candidates(config, root), ""]
        except UserError as caught:
            found = [[], str(caught)]
    dist.broadcast_object_list(found, src=0)
    candidates, error = found
    if error:
        raise UserError(error, shared=True)
    for number, candidate in enumerate(candidates):
        try:
            verify_together(candidate)
        except UserError as caught:
            last = number + 1 == len(candidates)
            if last or not config.checkpoint.fallback:
                raise
            if dims.rank == 0:
                log.warning("%s; resuming from %s instead", caught, candidates[number + 1].name)
            continue
        raise_together(_incompatible(config, candidate))
        return Path(candidate)
    return None


def resume_state(dims: ParallelDims, engine: Engine, checkpoint: Path, state: TrainerState) -> None:
    """Load what `find_resumable` found into `engine`, cut for this layout, and this rank's random state. Collective.

    Raises:
        UserError: on every rank, when the checkpoint is of another model.
    """
    error = ""
    try:
        with TensorReader(checkpoint, rules=engine.sharding) as reader:
            load_state(engine, dims, reader, [state.optimizer_step, state.apart.optimizer_step])
    except UserError as caught:
        error = str(caught)
    raise_together(error)
    load_rng(checkpoint, dims.rank)


def check_same_weights(now: DataConfig, saved: DataConfig, state: TrainerState) -> None:
    """That every source of the run is still there, in the same order, and had the same weights up to the checkpoint.

    Sources may be added and weights may change from the checkpoint on. The order decides between sources that are due
    at the same row.

    Raises:
        UserError: a source is gone or stands elsewhere, or a weight of the past is another one.
    """
    row = Cursor.from_json(state.cursor).row
    gone = set(state.datasets) - {source.name for source in now.train_sources}
    if gone:
        raise UserError(
            f"source {min(gone)}, which this run was trained on, is gone from data.sources; put it back (its weight "
            f"may become 0 with a data.weight_changes entry at {row * now.sequence_length:,} tokens or later) or use "
            "another output_dir"
        )
    order = [source.name for source in now.train_sources if source.name in state.datasets]
    if order != list(state.datasets):
        raise UserError(
            f"data.sources are in the order {', '.join(order)}; this run was trained with "
            f"{', '.join(state.datasets)}, and the order decides between two sources that are due for the same row; "
            "restore it (new sources may stand anywhere) or use another output_dir"
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


def _candidates(config: RunConfig, root: Path) -> list[Path]:
    """Committed checkpoints, the one to use first."""
    newest = find_checkpoint(root)
    if newest is None:
        if config.checkpoint.resume == "must":
            raise UserError(
                f"checkpoint.resume=must, but there is no checkpoint under {root}; correct output_dir or set "
                "checkpoint.resume=auto"
            )
        return []
    if root.stat().st_mode & stat.S_IWOTH and not root.stat().st_mode & stat.S_ISVTX:
        log.warning("every user of this machine can change %s; take that away with chmod o-w", root)
    before = step_of(newest)  # -1: the pointer was put on a copy of another name
    others = [path for path in reversed(committed(root)) if path != newest]
    return [newest, *(path for path in others if before < 0 or step_of(path) < before)]


def _incompatible(config: RunConfig, checkpoint: Path) -> str:
    """Why a run cannot resume from a checkpoint: it is of another model or another stream, or beyond the run's end."""
    saved, current = config_to_dict(saved_config(checkpoint)), config_to_dict(config)
    model = {
        "model": tuple(current["model"]),
        "predictor": tuple(current["predictor"]),
        "objective": ("name", "horizon", "detach_base"),
        "training": ("precision",),
    }
    for section, keys in (*model.items(), *STREAM_KEYS.items()):
        for key in keys:
            if saved[section].get(key) != current[section][key]:
                return (
                    f"{checkpoint} was saved with {section}.{key}={saved[section].get(key)}, this run has "
                    f"{current[section][key]}; change {section}.{key} back or use another output_dir"
                )
    state = read_state(checkpoint)
    if state.step > config.total_steps:
        return (
            f"training.train_tokens={config.training.train_tokens:,} ends at step {config.total_steps}, but "
            f"{checkpoint} has done {state.step} steps ({state.tokens:,} tokens); set training.train_tokens to "
            f"{state.tokens} or more, or use another output_dir for a shorter run"
        )
    return ""
