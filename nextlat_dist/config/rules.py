"""The rules between the values of a run's configuration, checked once and before anything is built.

The message of a broken rule gives the values, the rule and the key to change. What a single key may be stands at the
key (schema.py).
"""

from __future__ import annotations

import itertools

from nextlat_dist.config.entries import PREDICTORS
from nextlat_dist.config.keys import check_bounds
from nextlat_dist.config.schema import ObjectiveConfig, RunConfig
from nextlat_dist.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def validate(config: RunConfig, world_size: int | None = None) -> None:
    """Check every rule between values; with `world_size`, also those that depend on the number of ranks.

    Raises:
        UserError: the first broken rule.
    """
    check_bounds(config)
    _validate_sources(config)
    _validate_model(config)
    _validate_objective(config)
    _validate_schedule(config)
    _validate_target(config)
    _validate_parallel(config)
    if world_size is not None:
        _validate_world(config, world_size)


def _validate_sources(config: RunConfig) -> None:
    data = config.data
    names = [source.name for source in data.train_sources]
    _require(
        data.train is None or not data.sources,
        f"data.train={data.train} and data.sources are both set; put every dataset into data.sources",
    )
    _require(len(set(names)) == len(names), f"data.sources has the names {', '.join(names)}; give each its own")
    _require(
        not data.sources or any(source.weight > 0 for source in data.sources),
        "every weight in data.sources is 0; one must be positive",
    )
    at = [0, *(row for row, _ in data.weight_changes_by_row)]
    _require(
        all(one < next_one for one, next_one in itertools.pairwise(at)),
        f"data.weight_changes are at {', '.join(str(c.at_tokens) for c in data.weight_changes)} tokens; each must be a "
        f"row of data.sequence_length={data.sequence_length} tokens or more after the one before, the first after 0",
    )
    for change in data.weight_changes:
        _require(
            set(change.weights) == set(names),
            f"data.weight_changes at {change.at_tokens} tokens names {', '.join(change.weights) or 'nothing'}; it must "
            f"give a weight for each of {', '.join(names)}",
        )
        _require(
            all(weight >= 0 for weight in change.weights.values()) and any(change.weights.values()),
            f"data.weight_changes at {change.at_tokens} tokens has the weights "
            f"{', '.join(map(str, change.weights.values()))}; none may be negative and one must be positive",
        )


def _validate_model(config: RunConfig) -> None:
    model, objective, data = config.model, config.objective, config.data
    heads, groups = model.num_attention_heads, model.query_groups
    PREDICTORS.find(config.predictor.fusion)
    _require(
        model.hidden_size % heads == 0 and (model.hidden_size // heads) % 2 == 0,
        f"model.hidden_size={model.hidden_size} over model.num_attention_heads={heads} must give an even head size",
    )
    _require(
        heads % groups == 0,
        f"model.num_attention_heads={heads} is not divisible by model.num_query_groups={groups}",
    )
    _require(
        data.sequence_length <= config.max_position_embeddings,
        f"data.sequence_length={data.sequence_length} is longer than "
        f"model.max_position_embeddings={config.max_position_embeddings}",
    )
    _require(
        objective.steps_ahead < data.sequence_length,
        f"objective.horizon={objective.horizon} must be smaller than data.sequence_length={data.sequence_length}",
    )


def _validate_objective(config: RunConfig) -> None:
    """A latent predictor, or mtp's layers, that no term trains would be built for nothing; a pipeline would hang."""
    objective, entry = config.objective, config.objective.entry
    for name, value in objective.options.items():
        _require(
            name in entry.options,
            f"objective.options.{name} is not an option of objective.name={objective.name}, which has "
            f"{', '.join(entry.options) or 'none'}; remove it",
        )
        kinds = (int, float) if isinstance(entry.options[name], float) else type(entry.options[name])
        _require(
            isinstance(value, kinds) and isinstance(value, bool) == isinstance(entry.options[name], bool),
            f"objective.options.{name} is {value!r}, it must be of type {type(entry.options[name]).__name__}",
        )
    _require(
        objective.semantics == "paper" or entry.released,
        f"objective.semantics=release is not known for objective.name={objective.name}, as it is for next_token, "
        "nextlat and mtp; use objective.semantics=paper",
    )
    _require(
        not objective.detach_base or entry.apart is not None,
        f"objective.detach_base=true trains a predictor apart from the base, but objective.name={objective.name} has "
        "none; use objective.name=nextlat, or objective.detach_base=false",
    )
    _require(
        not objective.detach_base or objective.ever_weighs("lambda_next_token"),
        f"objective.detach_base=true with objective.lambda_next_token={objective.lambda_next_token} leaves the base "
        "nothing to learn; make it positive",
    )
    for key in ("stop_gradient_target", "stop_gradient_head"):
        _require(
            not objective.detach_base or getattr(objective, key),
            f"objective.{key}=false moves the base with the predictor's terms, which objective.detach_base=true keeps "
            f"from it; change one of them",
        )
    _require(
        objective.largest_gap is None or objective.largest_gap >= objective.least_gap,
        f"objective.largest_gap={objective.largest_gap} is below objective.least_gap={objective.least_gap}; raise it",
    )
    _validate_lambda_schedule(objective)
    weights = {key: objective.weight(key) for key in entry.weights}
    for key, value in weights.items():
        _require(value >= 0, f"objective.{key} is {value}, it must not be negative")
    instead = ", or objective.name=next_token" if entry.terms else ""
    _require(
        any(objective.ever_weighs(key) for key in weights),
        f"objective.name={objective.name} with {' and '.join(f'objective.{key}=0' for key in weights)} has nothing "
        f"to learn; make {'one of them' if len(weights) > 1 else 'it'} positive{instead}",
    )
    entry.check(config)


def _validate_lambda_schedule(objective: ObjectiveConfig) -> None:
    known = ["lambda_next_token", *(term.weight for term in objective.entry.terms if term.weight is not None)]
    for key in objective.lambda_schedule:
        _require(
            key in known,
            f"objective.lambda_schedule.{key} is no weight of objective.name={objective.name}, which has "
            f"{', '.join(known)}; remove it",
        )


def _validate_schedule(config: RunConfig) -> None:
    schedule, total = config.schedule, config.training.train_tokens
    decay = schedule.decay_tokens if schedule.name == "wsd" else 0
    _require(
        schedule.warmup_tokens + decay <= total,
        f"schedule.warmup_tokens={schedule.warmup_tokens} and schedule.decay_tokens={decay} together exceed "
        f"training.train_tokens={total}",
    )
    _require(
        schedule.min_lr <= config.optimizer.lr,
        f"schedule.min_lr={schedule.min_lr} is above optimizer.lr={config.optimizer.lr}",
    )


def _validate_target(config: RunConfig) -> None:
    training = config.training
    if training.target_loss is None:
        return
    wanted = f"training.target_loss={training.target_loss} is looked for in validations"
    for key in ("validation_interval", "validation_batches"):
        _require(
            getattr(training, key) > 0,
            f"{wanted}, but training.{key} is 0; make it positive, or leave training.target_loss out",
        )
    _require(config.data.validation is not None, f"{wanted}, but data.validation is not set; set it")


def _validate_parallel(config: RunConfig) -> None:
    model, parallel = config.model, config.parallel
    tp, pp, zero = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.zero_stage
    for key, value in {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.query_groups,
        "model.ffn_hidden_size": model.ffn_size,
        "predictor.hidden_size": config.predictor_hidden_size,
    }.items():
        _require(
            value % tp == 0,
            f"{key}={value} is not divisible by parallel.tensor_model_parallel_size={tp}",
        )
    _require(
        model.padded_vocab_size % tp == 0,
        f"the vocabulary padded to {model.padded_vocab_size} is not divisible by "
        f"parallel.tensor_model_parallel_size={tp}; change model.make_vocab_size_divisible_by",
    )
    _require(
        tp > 1 or not parallel.sequence_parallel,
        f"parallel.sequence_parallel=true divides the sequence over tensor-parallel ranks, but "
        f"parallel.tensor_model_parallel_size={tp}; set it to 2 or more, or parallel.sequence_parallel=false",
    )
    _require(
        not parallel.sequence_parallel or config.data.sequence_length % tp == 0,
        f"data.sequence_length={config.data.sequence_length} is not divisible by "
        f"parallel.tensor_model_parallel_size={tp}, as parallel.sequence_parallel=true needs; change one of them",
    )
    _require(
        pp == 1 or zero <= 1,
        f"parallel.zero_stage={zero} cannot be used with parallel.pipeline_model_parallel_size={pp}: "
        "a pipeline allows parallel.zero_stage 0 or 1",
    )
    _require(
        pp <= model.num_layers,
        f"parallel.pipeline_model_parallel_size={pp} exceeds model.num_layers={model.num_layers}: "
        "every stage needs a decoder layer",
    )
    _require(
        pp == 1 or config.objective.entry.pipeline,
        f"parallel.pipeline_model_parallel_size={pp} cannot be used with objective.name={config.objective.name}, whose "
        "layers are no chain; set it to 1, and parallel.tensor_model_parallel_size or parallel.zero_stage higher",
    )
    given = parallel.pipeline_layers
    _require(
        given is None or (len(given) == pp and sum(given) == model.num_layers),
        f"parallel.pipeline_layers={given} must have parallel.pipeline_model_parallel_size={pp} numbers whose sum is "
        f"model.num_layers={model.num_layers}; null divides them by cost",
    )
    _require(
        config.training.precision != "bf16" or zero >= 1,
        "training.precision=bf16 with parallel.zero_stage=0 would accumulate gradients in bf16; "
        "use parallel.zero_stage=1 or more, which accumulates in fp32",
    )
    _require(
        not (model.tie_embeddings and zero == 3),
        "model.tie_embeddings=true cannot be used with parallel.zero_stage=3: the head would read a weight that the "
        "embedding has released; use parallel.zero_stage=2 or less",
    )


def _batch_that_fits(total: int, micro: int, dp: int) -> str:
    """What to add to the command: smaller micro-batches where the batch itself can stay, else the next larger batch."""
    if total % dp == 0:
        smaller = next(size for size in range(min(micro, total // dp), 0, -1) if (total // dp) % size == 0)
        return f"add training.micro_batch_size={smaller}, which keeps the batch"
    return f"add training.global_batch_size={-(-total // (micro * dp)) * micro * dp}, the next larger batch"


def _validate_world(config: RunConfig, world_size: int) -> None:
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    micro, total = config.training.micro_batch_size, config.training.global_batch_size
    _require(
        world_size % (tp * pp) == 0,
        f"{world_size} ranks cannot be divided into groups of parallel.tensor_model_parallel_size={tp} x "
        f"parallel.pipeline_model_parallel_size={pp}",
    )
    dp = world_size // (tp * pp)
    _require(
        total % (micro * dp) == 0,
        f"training.global_batch_size={total} is not a multiple of training.micro_batch_size={micro} x "
        f"{dp} data-parallel ranks; {_batch_that_fits(total, micro, dp)}",
    )
