"""Saving and resuming a run: weights, optimizer, every rank's random state and the data cursor, in one commit.

A resume at the same topology continues bit-identically; any other topology can read the same state. The learning rate
needs no state: it is a function of tokens.
"""

from __future__ import annotations

import json
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nextlat_dist.checkpoint.commit import committed, find_checkpoint, verify_together
from nextlat_dist.checkpoint.rng import load_rng, rng_file, rng_state
from nextlat_dist.checkpoint.tensors import HostCopies, TensorReader, rank_place
from nextlat_dist.checkpoint.writer import CheckpointWriter, SaveOutcome, Snapshot
from nextlat_dist.config.load import config_from_dict, config_to_dict, dump_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import Cursor
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.dims import ParallelDims, raise_together
from nextlat_dist.training.engine.master_state import load_state, own_fragments
from nextlat_dist.training.engine.protocol import Engine

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
    optimizer_step: int = 0  # steps that Adam has taken
    skipped: list[list[int]] = field(default_factory=list)  # global rows [first, end) that are not in the weights
    bad_steps: int = 0  # skipped steps since the last applied one
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of applied steps, for spikes


class Saver:
    """Saves a run beside its training. Every method but `outcomes` is collective."""

    def __init__(
        self, config: RunConfig, dims: ParallelDims, engine: Engine, root: Path, tokenizer: bytes | None
    ) -> None:
        self._config, self._dims, self._engine, self._tokenizer = config, dims, engine, tokenizer
        self._copies = HostCopies()
        settings = config.checkpoint
        self._writer = CheckpointWriter(
            root, keep_last=settings.keep_last, keep_every=settings.keep_every, background=settings.background
        )

    def save(self, state: TrainerState) -> None:
        """Copy everything to host memory and begin to write it; waits for the save before."""
        state.optimizer_step = self._engine.optimizer_steps()
        description = {"topology": _topology(self._config, self._dims)}
        self._writer.save(state.step, description, lambda: self._snapshot(state))

    def outcomes(self) -> list[SaveOutcome]:
        """The saves that ended since the last call; waits for nothing."""
        return self._writer.outcomes()

    def finish(self) -> list[SaveOutcome]:
        """Wait for the save under way, then `outcomes`."""
        return self._writer.finish()

    def close(self) -> None:
        self._writer.close()

    def _snapshot(self, state: TrainerState) -> Snapshot:
        dims = self._dims
        files = {rng_file(dims.rank): rng_state()}
        if dims.rank == 0:
            files[STATE_FILE] = (json.dumps(asdict(state), indent=1) + "\n").encode()
            files[CONFIG_FILE] = dump_config(self._config).encode()
            if self._tokenizer is not None:
                files[TOKENIZER_FILE] = self._tokenizer
        place = rank_place(dims.tensor_rank, dims.pipeline_rank, dims.data_rank)
        return Snapshot(place, self._copies.take(own_fragments(self._engine, dims)), files)


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
                print(f"warning: {caught}; going on from {candidates[number + 1].name}", flush=True)
            continue
        raise_together(_incompatible(config, candidate))
        return Path(candidate)
    return None


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run that wrote `checkpoint` was."""
    return TrainerState(**json.loads((checkpoint / STATE_FILE).read_text()))


def resume_state(dims: ParallelDims, engine: Engine, checkpoint: Path, state: TrainerState) -> None:
    """Load what `find_resumable` found into `engine`, cut for this layout, and this rank's random state. Collective.

    Raises:
        UserError: on every rank, when the checkpoint is of another model.
    """
    error = ""
    try:
        with TensorReader(checkpoint, rules=engine.sharding) as reader:
            load_state(engine, dims, reader, state.optimizer_step)
    except UserError as caught:
        error = str(caught)
    raise_together(error)
    load_rng(checkpoint, dims.rank)


def saved_config(checkpoint: Path) -> RunConfig:
    """The configuration of the run that wrote `checkpoint`."""
    import yaml

    return config_from_dict(yaml.safe_load((checkpoint / CONFIG_FILE).read_text()))


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
        print(f"warning: every user of this machine can change {root}; take that away with chmod o-w", flush=True)
    return [newest, *(older for older in reversed(committed(root)) if older.name < newest.name)]


def _incompatible(config: RunConfig, checkpoint: Path) -> str:
    saved, current = config_to_dict(saved_config(checkpoint)), config_to_dict(config)
    for section, keys in {
        "model": list(current["model"]),
        "predictor": ["hidden_size"],
        "objective": ["name", "horizon"],
        "data": ["sequence_length", "packing", "shuffle", "shuffle_window_records"],
        "training": ["global_batch_size", "precision"],
    }.items():
        for key in keys:
            if saved[section].get(key) != current[section][key]:
                return (
                    f"{checkpoint} was saved with {section}.{key}={saved[section].get(key)}, this run has "
                    f"{current[section][key]}; change {section}.{key} back or use another output_dir"
                )
    return ""


def _topology(config: RunConfig, dims: ParallelDims) -> dict[str, int]:
    return {
        "tensor": dims.tensor_size,
        "pipeline": dims.pipeline_size,
        "data": dims.data_size,
        "zero_stage": config.parallel.zero_stage,
    }
