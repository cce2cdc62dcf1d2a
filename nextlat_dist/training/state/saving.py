"""Saving a run: weights, optimizer, every rank's random state and the data cursor, in one commit."""

from __future__ import annotations

from pathlib import Path

from nextlat_dist.checkpoint.rng import rng_file, rng_state
from nextlat_dist.checkpoint.tensors import HostCopies, rank_name
from nextlat_dist.checkpoint.writer import CheckpointWriter, SaveOutcome, Snapshot
from nextlat_dist.config.load import dump_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.files import CONFIG_FILE, TOKENIZER_FILE, TRAINER_STATE_FILE
from nextlat_dist.parallel.dims import ParallelDims
from nextlat_dist.training.engine.master_state import own_fragments
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.state.trainer_state import TrainerState


class Saver:
    """Saves a run while it trains. Every method but `outcomes` is collective."""

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
            files[TRAINER_STATE_FILE] = state.to_json().encode()
            files[CONFIG_FILE] = dump_config(self._config).encode()
            if self._tokenizer is not None:
                files[TOKENIZER_FILE] = self._tokenizer
        name = rank_name(dims.tensor_rank, dims.pipeline_rank, dims.data_rank)
        return Snapshot(name, self._copies.take(own_fragments(self._engine, dims)), files)


def _topology(config: RunConfig, dims: ParallelDims) -> dict[str, int]:
    return {
        "tensor": dims.tensor_size,
        "pipeline": dims.pipeline_size,
        "data": dims.data_size,
        "zero_stage": config.parallel.zero_stage,
    }
