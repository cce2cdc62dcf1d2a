"""From a configuration to a finished run on this rank: `train(config)`.

from nextlat_dist import train
result = train(load_config("run.yaml"))
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from nextlat_dist.checkpoint.run_lock import take_lock
from nextlat_dist.config.load import dump_config
from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import Cursor, RowLoader
from nextlat_dist.errors import UserError, require_extra
from nextlat_dist.files import CHECKPOINTS_FOLDER, CONFIG_FILE, CannotWriteError, write_whole
from nextlat_dist.parallel.compiled import compiled_pieces
from nextlat_dist.parallel.device import deterministic_kernels, device, third_parties
from nextlat_dist.parallel.dims import ParallelDims, raise_together, shutdown, world_size_from_environment
from nextlat_dist.plan.describe import data_parallel_size, describe
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.log import logger
from nextlat_dist.training.engine.build import build_engine
from nextlat_dist.training.engine.deepspeed_config import deepspeed_config
from nextlat_dist.training.health.signals import StopRequest
from nextlat_dist.training.loop import Trainer
from nextlat_dist.training.metrics import MetricsLog, NoLog
from nextlat_dist.training.open_data import (
    batch_source,
    open_training_data,
    open_validation_data,
    tokenizer_model,
)
from nextlat_dist.training.state.resume import check_same_datasets, check_same_weights, find_resumable, resume_state
from nextlat_dist.training.state.saving import Saver
from nextlat_dist.training.state.trainer_state import TrainerState, read_state, saved_config
from nextlat_dist.training.validation import validation_set

log = logger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        run_directory: its output_dir.
        checkpoints: the folder to export from.
        steps: steps taken since the beginning of the run, resumes included.
        tokens: positions trained on.
        stopped: it was asked to stop and saved before its end; the same call resumes it.
        metrics: the last logged loss terms, validation's as `validation_…`; the same on every rank; None where there
            was no training target.
    """

    run_directory: Path
    checkpoints: Path
    steps: int
    tokens: int
    stopped: bool
    metrics: dict[str, float | None]


def train(config: RunConfig, stop: StopRequest | None = None) -> RunResult:
    """Run `config` to its end on the ranks that the launcher started. Collective.

    Afterwards the model is no longer in memory (under ZeRO-3 it is: DeepSpeed keeps it), process groups that were not
    there before are gone, and torch is as it was.

    Args:
        stop: looked at before every optimizer step; once it is requested on a rank, the run is saved and ends.

    Raises:
        UserError: anything a user can repair, the same sentence on every rank.
    """
    world_size = world_size_from_environment()
    validate(config, world_size)
    if not config.data.train_sources:
        raise UserError(
            "data.train is not set; give it a directory written by `nextlat-data shard`, or set data.sources"
        )
    deepspeed_config(config, data_parallel_size(config, world_size))  # its contradictions are the user's to hear first
    require_extra("train", "deepspeed", "megatron.core", purpose="training")
    with third_parties(), deterministic_kernels(config.training.deterministic):
        ranks_had_met = dist.is_initialized()
        dims = ParallelDims.initialize(config.parallel)
        with compiled_pieces(config.training.compile, device()):
            result = _train(config, dims, stop or StopRequest())
        gc.collect()  # a model is full of cycles
        if not ranks_had_met:
            shutdown()
    return result


def _train(config: RunConfig, dims: ParallelDims, stop: StopRequest) -> RunResult:
    with _sole_run(Path(config.output_dir), dims):
        return _train_alone(config, dims, stop)


@contextlib.contextmanager
def _sole_run(output_dir: Path, dims: ParallelDims) -> Iterator[None]:
    """No other run writes into `output_dir`, which is made, for as long as the block runs. Collective.

    Raises:
        UserError: on every rank, when it cannot be written, or another run is in.
    """
    lock, error = None, ""
    if dims.rank == 0:
        error = _cannot_write(output_dir)
        try:
            lock = take_lock(output_dir, waiting=log.warning) if not error else None
        except UserError as caught:
            error = str(caught)
        except OSError as caught:
            error = f"output_dir={output_dir} cannot be written ({caught}); repair the access or change output_dir"
    try:
        raise_together(error)
        yield
    finally:
        if lock is not None:
            lock.release()


def _train_alone(config: RunConfig, dims: ParallelDims, stop: StopRequest) -> RunResult:
    output_dir = Path(config.output_dir)
    if dims.rank == 0:
        say(describe(config, dims.world_size))
    # Data and checkpoint first: what is missing should not be found out after a model was built.
    checkpoints = output_dir / CHECKPOINTS_FOLDER
    checkpoint = find_resumable(config, dims, checkpoints)
    state = TrainerState()
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_same_weights(config.data, saved_config(checkpoint).data, state)
    with contextlib.ExitStack() as stack:
        loader = open_training_data(config, dims, Cursor.from_json(state.cursor))
        if loader is not None:
            stack.callback(loader.close)
        check_same_datasets(state, loader)
        tokenizer = tokenizer_model(config, loader)
        validates = config.data.validation is not None and config.training.validation_batches > 0
        validation_loader = open_validation_data(config, dims) if validates else None
        engine = build_engine(config, dims)
        stack.callback(engine.close)
        if checkpoint is not None:
            resume_state(dims, engine, checkpoint, state)
        saver = Saver(config, dims, engine, checkpoints, tokenizer)
        stack.callback(saver.close)
        metrics = _start_log(config, dims, output_dir, state, loader)
        stack.callback(metrics.close)
        source = batch_source(config, dims, loader, engine.device)
        validation = validation_set(config, dims, validation_loader, engine.device) if validates else None
        trainer = Trainer(config, dims, engine, state, source, validation, metrics, saver, stop)
        stopped = trainer.run()
        return RunResult(output_dir, checkpoints, state.step, state.tokens, stopped, trainer.last_metrics)


def _cannot_write(output_dir: Path) -> str:
    """Why the run's directory cannot be used; makes it where it is not there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as probe:
            probe.write(b"\0" * 65536)
    except OSError as error:
        return (
            f"output_dir={output_dir} cannot be written ({error}); free space or repair the access, or change "
            "output_dir"
        )
    return ""


def _start_log(
    config: RunConfig, dims: ParallelDims, output_dir: Path, state: TrainerState, loader: RowLoader | None
) -> MetricsLog | NoLog:
    """`_first_log` on rank 0. Collective; raises UserError on every rank when it cannot be written."""
    metrics: MetricsLog | NoLog = NoLog()
    refused = ""
    if loader is not None and dims.rank == 0:
        try:
            metrics = _first_log(config, output_dir, state, loader)
        except CannotWriteError as error:
            refused = str(error)
    raise_together(refused)
    return metrics


def _first_log(config: RunConfig, output_dir: Path, state: TrainerState, loader: RowLoader) -> MetricsLog:
    """Write the resolved configuration, open the metrics, and note in `state` what a resume must find again."""
    write_whole(output_dir / CONFIG_FILE, dump_config(config))
    if state.step:
        say(f"resumed at step {state.step}, {state.tokens:,} tokens")
    metrics = MetricsLog(config, output_dir, state.step, state.wandb_id)
    state.wandb_id = metrics.wandb_id
    state.datasets = {name: manifest.digest for name, manifest in loader.manifests.items()}
    return metrics
