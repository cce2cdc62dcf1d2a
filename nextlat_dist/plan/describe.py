"""The description of a run in a few lines: parameters, objective, layout, batch, length, stages. Torch-free.

The head of a run, `nextlat train --dry-run` and the doctor print the same description.
"""

from __future__ import annotations

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.plan.counting import parameter_counts


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
        + "".join(
            f", {text} {_count(counts[part])}, with {word} {_count(counts['total'])}"
            for part, (text, word) in objective.entry.parts.items()
        ),
        f"objective   {objective.name}"
        + (f", horizon {objective.horizon}" if objective.steps_ahead else "")
        + "".join(f", lambda_{term.name} {objective.weight(term.weight):g}" for term in objective.entry.terms),
        f"layout      {world_size} ranks = tensor {tp} x pipeline {pp} x data {dp}, ZeRO {config.parallel.zero_stage}, "
        f"{training.precision}",
        f"batch       {training.global_batch_size} rows x {config.data.sequence_length} tokens = "
        f"{training.micro_batch_size} rows x {accumulation:g} micro-batches x {dp} data-parallel ranks",
        f"length      {config.total_steps:,} steps, {config.total_steps * config.tokens_per_step:,} tokens",
    ]
    return "\n".join(lines)


def describe_stages(config: RunConfig) -> str:
    """A line for each pipeline stage."""
    stages = stage_contents(config.model.num_layers, config.parallel.pipeline_model_parallel_size)
    return "\n".join(f"stage {number}     {text}" for number, text in enumerate(stages))


def stage_contents(layers: int, stages: int) -> list[str]:
    """What each stage holds: decoder layers as evenly as they can be, the first stages having one more."""
    sizes = [layers // stages + (1 if i < layers % stages else 0) for i in range(stages)]
    texts, start = [], 0
    for index, size in enumerate(sizes):
        text = f"decoder layers {start}..{start + size - 1}"
        text = "token embedding, " + text if index == 0 else text
        texts.append(text + ", final norm, objective" if index == stages - 1 else text)
        start += size
    return texts


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    return world_size // (config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size)


def _count(value: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)
