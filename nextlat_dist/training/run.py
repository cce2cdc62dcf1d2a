"""`nextlat train`: from a configuration to a finished run on this rank."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from nextlat_dist.config.load import dump_config
from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import Cursor, RowLoader
from nextlat_dist.errors import UserError
from nextlat_dist.objective.terms import term_groups
from nextlat_dist.parallel.dims import ParallelDims, raise_together, world_size_from_environment
from nextlat_dist.plan.counting import parameter_counts
from nextlat_dist.training.engine.build import build_engine
from nextlat_dist.training.engine.deepspeed_config import deepspeed_config
from nextlat_dist.training.loop import Trainer
from nextlat_dist.training.metrics import MetricsLog
from nextlat_dist.training.open_data import (
    batch_source,
    check_same_datasets,
    check_same_weights,
    open_training_data,
    open_validation_data,
    tokenizer_model,
    validation_set,
)
from nextlat_dist.training.state.saving import (
    CONFIG_FILE,
    Saver,
    TrainerState,
    find_resumable,
    read_state,
    resume_state,
    saved_config,
)


def train(config: RunConfig) -> None:
    """Run `config` to its end on the ranks that the launcher started. Collective.

    Raises:
        UserError: anything a user can mend, the same sentence on every rank.
    """
    world_size = world_size_from_environment()
    validate(config, world_size)
    if not config.data.train_sources:
        raise UserError(
            "data.train is not set; give it a directory written by `nextlat-data shard`, or set data.sources"
        )
    deepspeed_config(config, _data_parallel_size(config, world_size))  # its contradictions are the user's to hear first
    dims = ParallelDims.initialize(config.parallel)
    output_dir = Path(config.output_dir)
    raise_together(_cannot_write(output_dir) if dims.rank == 0 else "")
    if dims.rank == 0:
        print(describe(config, dims.world_size), flush=True)
    # Data and checkpoint first: what is missing should not be found out after a model was built.
    checkpoint = find_resumable(config, dims, output_dir / "checkpoints")
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
        if checkpoint is not None:
            resume_state(dims, engine, checkpoint, state)
        saver = Saver(config, dims, engine, output_dir / "checkpoints", tokenizer)
        stack.callback(saver.close)
        log = None
        if loader is not None and dims.rank == 0:
            log = _start_log(config, output_dir, state, loader)
            stack.callback(log.close)
        source = batch_source(config, dims, loader, engine.device)
        validation = validation_set(config, dims, validation_loader, engine.device) if validates else None
        Trainer(config, dims, engine, state, source, validation, log, saver).run()


def _cannot_write(output_dir: Path) -> str:
    """Why the run's directory cannot be used; makes it where it is not there."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as probe:
            probe.write(b"\0" * 65536)
    except OSError as error:
        return (
            f"output_dir={output_dir} cannot be written ({error}); make room or mend the access, or change output_dir"
        )
    return ""


def _start_log(config: RunConfig, output_dir: Path, state: TrainerState, loader: RowLoader) -> MetricsLog:
    """Write the resolved configuration, open the metrics, and note in `state` what a resume must find again."""
    (output_dir / CONFIG_FILE).write_text(dump_config(config))
    if state.step:
        print(f"resumed at step {state.step}, {state.tokens:,} tokens", flush=True)
    log = MetricsLog(config, output_dir, state.step, state.wandb_id)
    state.wandb_id = log.wandb_id
    state.datasets = {name: manifest.digest for name, manifest in loader.manifests.items()}
    return log


def describe(config: RunConfig, world_size: int) -> str:
    """Parameters, layout and batch arithmetic, for the head of a run and for `--dry-run`."""
    counts, model, training = parameter_counts(config), config.model, config.training
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = _data_parallel_size(config, world_size)
    accumulation = training.global_batch_size / (training.micro_batch_size * dp)
    lines = [
        f"model       {model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_size}, "
        f"heads {model.num_attention_heads} (key/value {model.query_groups}), vocabulary {model.vocab_size:,} "
        f"(padded {model.padded_vocab_size:,})",
        f"parameters  base {_count(counts['base'])} (embedding {_count(counts['embedding'])}, decoder "
        f"{_count(counts['decoder'])}, head {_count(counts['output_layer'])})"
        + "".join(
            f", {text} {_count(counts[part])}, with {word} {_count(counts['total'])}"
            for part, (text, word) in config.objective.entry.parts.items()
        ),
        f"objective   {config.objective.name}"
        + (f", horizon {config.objective.horizon}" if config.objective.steps_ahead else "")
        + "".join(f", lambda_{group.name} {group.factor:g}" for group in term_groups(config.objective)),
        f"layout      {world_size} ranks = tensor {tp} x pipeline {pp} x data {dp}, ZeRO {config.parallel.zero_stage}, "
        f"{training.precision}",
        f"batch       {training.global_batch_size} rows x {config.data.sequence_length} tokens = "
        f"{training.micro_batch_size} rows x {accumulation:g} micro-batches x {dp} data-parallel ranks",
        f"length      {config.total_steps:,} steps, {config.total_steps * config.tokens_per_step:,} tokens",
    ]
    return "\n".join(lines)


def dry_run(config: RunConfig) -> str:
    """Everything that can be checked and said without building anything: description, stages, resolved config."""
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    world = int(os.environ.get("WORLD_SIZE", tp * pp))
    validate(config, world)
    deepspeed_config(config, _data_parallel_size(config, world))
    stages = [f"stage {i}     {text}" for i, text in enumerate(_stages(config.model.num_layers, pp))]
    return "\n".join([describe(config, world), *stages, "", dump_config(config)])


def _data_parallel_size(config: RunConfig, world_size: int) -> int:
    return world_size // (config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size)


def _stages(layers: int, stages: int) -> list[str]:
    sizes = [layers // stages + (1 if i < layers % stages else 0) for i in range(stages)]
    texts, start = [], 0
    for index, size in enumerate(sizes):
        text = f"decoder layers {start}..{start + size - 1}"
        text = "token embedding, " + text if index == 0 else text
        texts.append(text + ", final norm, objective" if index == stages - 1 else text)
        start += size
    return texts


def _count(value: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)
