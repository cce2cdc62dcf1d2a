"""The description of a run in a few lines: parameters, objective, layout, batch, length, stages. Torch-free.

The head of a run, `nextlat train --dry-run` and the doctor print the same description.
"""

from __future__ import annotations

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.plan.counting import parameter_counts
from nextlat_dist.plan.stages import slowest_over_mean, stage_contents


def describe(config: RunConfig, world_size: int) -> str:
    """Parameters, layout and batch arithmetic of `config` on so many ranks."""
    counts, model, training, objective = parameter_counts(config), config.model, config.training, config.objective
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    dp = data_parallel_size(config, world_size)
    accumulation = training.global_batch_size / (training.micro_batch_size * dp)
    lines = [
        f"model       {model.num_layers} layers, hidden {model.hidden_size}, ffn {model.ffn_size}, "
        f"heads {model.num_attention_heads} (key/value {model.query_groups}), vocabulary {model.vocab_size:,} "
        f"(padded {model.padded_vocab_size:,})",
        f"parameters  base {_count(counts['base'])} (embedding {_count(counts['embedding'])}, decoder "
        f"{_count(counts['decoder'])}, head {_count(counts['output_layer'])})"
        + "".join(f", {text} {_count(counts[part])}" for part, (text, _) in objective.entry.parts.items())
        + (f", with {_pronoun(config)} {_count(counts['total'])}" if objective.entry.parts else ""),
        f"objective   {objective.name}"
        + (f", horizon {objective.horizon}" if objective.steps_ahead else "")
        + "".join(f", lambda_{t.name} {objective.weight(t.weight):g}" for t in objective.entry.terms if t.weight),
        f"layout      {world_size} ranks = tensor {tp} x pipeline {pp} x data {dp}, ZeRO {config.parallel.zero_stage}, "
        f"{training.precision}",
        f"batch       {training.global_batch_size} rows x {config.data.sequence_length} tokens = "
        f"{training.micro_batch_size} rows x {accumulation:g} micro-batches x {dp} data-parallel ranks",
        f"length      {config.total_steps:,} steps, {config.total_steps * config.tokens_per_step:,} tokens"
        + (f", or to a validation loss of {training.target_loss:g}" if training.target_loss is not None else ""),
    ]
    return "\n".join(lines)


def describe_stages(config: RunConfig) -> str:
    """A line for each pipeline stage, and how well they are balanced."""
    lines = [f"stage {number}     {text}" for number, text in enumerate(stage_contents(config))]
    if len(lines) > 1:
        lines.append(f"balance     the slowest stage has {slowest_over_mean(config):.2f} x the mean's FLOPs")
    return "\n".join(lines)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    return world_size // (config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size)


def _pronoun(config: RunConfig) -> str:
    """Of what the objective adds."""
    words = [word for _, word in config.objective.entry.parts.values()]
    return words[0] if len(words) == 1 else "them"


def _count(value: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)
