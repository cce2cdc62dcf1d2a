"""Saving and resuming a run: DeepSpeed's state, our weights, every rank's random state and the data cursor, in one
commit.

A resume at the same topology continues bit-identically. The learning rate needs no state: it is a function of tokens.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nextlat_dist.checkpoint.commit import commit, find_checkpoint, prune, read_manifest, verify, verify_together
from nextlat_dist.checkpoint.rng import load_rng, save_rng
from nextlat_dist.checkpoint.weights import save_weights
from nextlat_dist.config.load import config_from_dict, config_to_dict, dump_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import Cursor
from nextlat_dist.errors import UserError
from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.parallel.dims import ParallelDims, raise_together
from nextlat_dist.training.build import Engine

DEEPSPEED_TAG = "deepspeed"
STATE_FILE = "trainer_state.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.model"


@dataclass
class TrainerState:
    """Where a run is: a few numbers that know nothing of ranks."""

    step: int = 0
    tokens: int = 0
    cursor: dict[str, Any] = field(default_factory=lambda: Cursor().to_json())  # place in the data, kept by rank 0
    datasets: dict[str, str] = field(default_factory=dict)  # manifest digest of each source
    wandb_id: str | None = None


def save_state(
    config: RunConfig, dims: ParallelDims, engine: Engine, state: TrainerState, root: Path, tokenizer: bytes | None
) -> None:
    """Commit a checkpoint of this step and prune old ones. Collective."""
    with commit(root, state.step, {"topology": _topology(config, dims)}) as directory:
        with _quiet():
            engine.inner.save_checkpoint(str(directory), tag=DEEPSPEED_TAG, save_latest=False)
        weights = local_weights(engine, config)
        if dims.data_rank == 0:
            save_weights(directory, weights, dims.tensor_rank, dims.pipeline_rank)
        save_rng(directory, dims.rank)
        if dims.rank == 0:
            (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")
            (directory / CONFIG_FILE).write_text(dump_config(config))
            if tokenizer is not None:
                (directory / TOKENIZER_FILE).write_bytes(tokenizer)
    if dims.rank == 0:
        prune(root, config.checkpoint.keep_last)


def local_weights(engine: Engine, config: RunConfig) -> dict[str, torch.Tensor]:
    """This rank's tensor-parallel shards {canonical name: fp32 master weight}, without tied copies of later stages.

    Collective over data-parallel ranks under ZeRO-3 and for bf16 master weights.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = config.parallel.zero_stage == 3 or config.training.precision != "fp32"
    weights = {}
    for name, parameter in canonical_parameters(engine.module):
        value = safe_get_full_fp32_param(parameter) if partitioned else parameter.detach()
        assert value is not None, name
        if not getattr(parameter, "ds_pipe_replicated", False):
            weights[name] = value.float()
    return weights


def find_resumable(config: RunConfig, dims: ParallelDims, root: Path) -> Path | None:
    """The newest committed checkpoint under `root`; None when there is none and none is required. Collective.

    Raises:
        UserError: nothing to resume though `checkpoint.resume=must`; a half-written checkpoint; another model or
            topology.
    """
    if config.checkpoint.resume == "never":
        return None
    error, checkpoint = "", None
    try:
        checkpoint = _find_compatible(config, dims, root)
    except UserError as caught:
        error = str(caught)
    raise_together(error)
    return checkpoint


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run that wrote `checkpoint` was."""
    return TrainerState(**json.loads((checkpoint / STATE_FILE).read_text()))


def resume_state(dims: ParallelDims, engine: Engine, checkpoint: Path) -> None:
    """Load what `find_resumable` found into `engine`, and this rank's random state. Collective.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    verify_together(checkpoint)
    with _quiet():
        loaded, _ = engine.inner.load_checkpoint(
            str(checkpoint), tag=DEEPSPEED_TAG, load_module_strict=True, load_lr_scheduler_states=False
        )
    assert loaded is not None
    load_rng(checkpoint, dims.rank)
    dist.barrier()


def saved_config(checkpoint: Path) -> RunConfig:
    """The configuration of the run that wrote `checkpoint`."""
    import yaml

    return config_from_dict(yaml.safe_load((checkpoint / CONFIG_FILE).read_text()))


def _find_compatible(config: RunConfig, dims: ParallelDims, root: Path) -> Path | None:
    checkpoint = find_checkpoint(root)
    if checkpoint is not None:
        verify(checkpoint, lambda name: "/" not in name)
        _check_compatible(config, dims, checkpoint, read_manifest(checkpoint))
    elif config.checkpoint.resume == "must":
        raise UserError(
            f"checkpoint.resume=must, but there is no checkpoint under {root}; correct output_dir or set "
            "checkpoint.resume=auto"
        )
    return checkpoint


def _check_compatible(config: RunConfig, dims: ParallelDims, checkpoint: Path, manifest: dict[str, Any]) -> None:
    import yaml

    theirs, ours = manifest["topology"], _topology(config, dims)
    # Without ZeRO every data-parallel rank has the whole optimizer state.
    free = {"data"} if theirs["zero_stage"] == ours["zero_stage"] == 0 else set()
    if any(theirs[key] != ours[key] for key in ours if key not in free):
        raise UserError(
            f"{checkpoint} was saved with {_describe(theirs)}, this run has {_describe(ours)}; a resume needs the same "
            "topology (with parallel.zero_stage=0 the number of data-parallel ranks may change): change the parallel "
            "section or the number of ranks"
        )
    saved = yaml.safe_load((checkpoint / CONFIG_FILE).read_text())
    current = config_to_dict(config)
    for section, keys in {
        "model": list(current["model"]),
        "predictor": ["hidden_size"],
        "objective": ["name", "horizon"],
        "data": ["sequence_length", "packing", "shuffle", "shuffle_window_records"],
        "training": ["global_batch_size", "precision"],
    }.items():
        for key in keys:
            if saved[section].get(key) != current[section][key]:
                raise UserError(
                    f"{checkpoint} was saved with {section}.{key}={saved[section].get(key)}, this run has "
                    f"{current[section][key]}; change {section}.{key} back or use another output_dir"
                )


def _topology(config: RunConfig, dims: ParallelDims) -> dict[str, int]:
    return {
        "tensor": dims.tensor_size,
        "pipeline": dims.pipeline_size,
        "data": dims.data_size,
        "zero_stage": config.parallel.zero_stage,
    }


def _describe(values: dict[str, Any]) -> str:
    layout = f"tensor {values['tensor']} x pipeline {values['pipeline']} x data {values['data']}"
    return f"{layout}, ZeRO {values['zero_stage']}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs every file it touches; a run's own lines should be readable."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
