"""Every rule between values: which sentence it is broken with, and where the border lies."""

from __future__ import annotations

import pytest

from nextlat_dist.config import RunConfig, load_config
from nextlat_dist.config.schema import swiglu_ffn_hidden_size
from nextlat_dist.errors import UserError

POSITIVE = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.ffn_hidden_size",
    "model.vocab_size",
    "model.make_vocab_size_divisible_by",
    "model.max_position_embeddings",
    "model.rotary_base",
    "model.norm_epsilon",
    "model.init_method_std",
    "predictor.hidden_size",
    "objective.horizon",
    "data.sequence_length",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "training.train_tokens",
    "training.micro_batch_size",
    "training.global_batch_size",
    "training.log_interval",
    "training.peak_tflops_per_device",
    "checkpoint.keep_last",
    "optimizer.lr",
    "optimizer.eps",
]
NOT_NEGATIVE = [
    "objective.lambda_next_token",
    "objective.lambda_hidden",
    "objective.lambda_kl",
    "objective.lambda_mtp",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "schedule.warmup_tokens",
    "schedule.decay_tokens",
    "schedule.min_lr",
    "training.seed",
    "training.validation_interval",
    "training.validation_batches",
    "checkpoint.save_interval",
]


def message(*overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(None, list(overrides), world_size)
    return str(caught.value)


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("key", POSITIVE)
def test_must_be_positive(key: str, value: str) -> None:
    text = message(f"{key}={value}")
    assert text.startswith(f"{key} is {value}")
    assert "must be positive" in text


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_must_not_be_negative(key: str) -> None:
    assert message(f"{key}=-1").startswith(f"{key} is -1")
    load_config(None, [f"{key}=0"])


RULES: list[tuple[list[str], list[str]]] = [  # overrides, and what the sentence must hold
    (["optimizer.betas=[0.9]"], ["optimizer.betas is [0.9]", "two numbers in [0, 1)"]),
    (["optimizer.betas=[0.9, 1]"], ["optimizer.betas is [0.9, 1.0]"]),
    (["optimizer.betas=[-0.1, 0.9]"], ["optimizer.betas is [-0.1, 0.9]"]),
    (
        ["model.hidden_size=250"],
        ["model.hidden_size=250", "model.num_attention_heads=4", "even head size"],
    ),
    (["model.hidden_size=12"], ["model.hidden_size=12", "even head size"]),  # head size 3 has no rotary halves
    (
        ["model.num_query_groups=3"],
        ["model.num_attention_heads=4 is not divisible by model.num_query_groups=3"],
    ),
    (
        ["model.max_position_embeddings=128"],
        ["data.sequence_length=256 is longer than model.max_position_embeddings=128"],
    ),
    (["objective.horizon=256"], ["objective.horizon=256 must be smaller than data.sequence_length=256"]),
    (["objective.name=mtp", "objective.horizon=256"], ["objective.horizon=256 must be smaller than"]),
    (
        ["schedule.warmup_tokens=600_000", "schedule.decay_tokens=400_001"],
        ["schedule.warmup_tokens=600000", "schedule.decay_tokens=400001", "training.train_tokens=1000000"],
    ),
    (
        ["schedule.name=cosine", "schedule.warmup_tokens=1_000_001"],
        ["schedule.warmup_tokens=1000001", "training.train_tokens=1000000"],
    ),
    (
        ["objective.lambda_hidden=0", "objective.lambda_kl=0"],
        ["objective.lambda_hidden=0 and objective.lambda_kl=0 has nothing to learn", "objective.name=next_token"],
    ),
    (
        ["objective.name=mtp", "objective.lambda_mtp=0"],
        ["objective.lambda_mtp=0 has nothing to learn; make it positive"],
    ),
    (
        ["objective.name=next_token", "objective.lambda_next_token=0"],
        ["objective.name=next_token with objective.lambda_next_token=0 has nothing to learn"],
    ),
    (["schedule.min_lr=0.01"], ["schedule.min_lr=0.01 is above optimizer.lr=0.001"]),
    (
        ["model.num_attention_heads=8", "parallel.tensor_model_parallel_size=3"],
        ["model.num_attention_heads=8 is not divisible by parallel.tensor_model_parallel_size=3"],
    ),
    (
        ["model.num_query_groups=2", "parallel.tensor_model_parallel_size=4"],
        ["model.num_query_groups=2 is not divisible by parallel.tensor_model_parallel_size=4"],
    ),
    (
        ["model.ffn_hidden_size=641", "parallel.tensor_model_parallel_size=2"],
        ["model.ffn_hidden_size=641 is not divisible by parallel.tensor_model_parallel_size=2"],
    ),
    (
        ["predictor.hidden_size=511", "parallel.tensor_model_parallel_size=2"],
        ["predictor.hidden_size=511 is not divisible by parallel.tensor_model_parallel_size=2"],
    ),
    (
        [
            "model.vocab_size=1001",
            "model.make_vocab_size_divisible_by=1",
            "parallel.tensor_model_parallel_size=2",
        ],
        ["padded to 1001", "parallel.tensor_model_parallel_size=2", "model.make_vocab_size_divisible_by"],
    ),
    (
        ["parallel.zero_stage=2", "parallel.pipeline_model_parallel_size=2"],
        ["parallel.zero_stage=2", "parallel.pipeline_model_parallel_size=2", "0 or 1"],
    ),
    (
        ["parallel.pipeline_model_parallel_size=9"],
        ["parallel.pipeline_model_parallel_size=9 exceeds model.num_layers=8"],
    ),
    (
        ["training.precision=bf16", "parallel.zero_stage=0"],
        ["training.precision=bf16", "parallel.zero_stage=0", "parallel.zero_stage=1"],
    ),
    (
        ["model.tie_embeddings=true", "parallel.zero_stage=3"],
        ["model.tie_embeddings=true", "parallel.zero_stage=3", "parallel.zero_stage=2"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), RULES, ids=lambda value: value[0])
def test_rule_is_broken_with_values_and_keys(overrides: list[str], parts: list[str]) -> None:
    text = message(*overrides)
    for part in parts:
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.max_position_embeddings=256"],
        ["objective.horizon=255"],
        ["objective.name=mtp", "objective.horizon=255"],
        ["objective.name=next_token", "objective.horizon=256"],  # no rollout, no rule
        ["schedule.warmup_tokens=600_000", "schedule.decay_tokens=400_000"],
        ["schedule.name=cosine", "schedule.warmup_tokens=600_000", "schedule.decay_tokens=900_000"],  # wsd's key only
        ["schedule.min_lr=0.001"],
        ["parallel.zero_stage=1", "parallel.pipeline_model_parallel_size=8"],
        ["parallel.zero_stage=3", "parallel.tensor_model_parallel_size=4"],
        ["training.precision=bf16", "parallel.zero_stage=1"],
        ["model.tie_embeddings=true", "parallel.zero_stage=2"],
        ["optimizer.betas=[0, 0]"],
    ],
    ids=lambda value: value[0],
)
def test_the_last_allowed_value(overrides: list[str]) -> None:
    load_config(None, overrides)


@pytest.mark.parametrize(
    ("world_size", "overrides", "parts"),
    [
        (
            3,
            ["parallel.tensor_model_parallel_size=2"],
            ["3 ranks", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=1"],
        ),
        (
            2,
            ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
            ["2 ranks", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        ),
        (
            4,
            [],
            ["training.global_batch_size=16", "training.micro_batch_size=8", "4 data-parallel ranks"],
        ),
        (
            8,
            ["parallel.tensor_model_parallel_size=2"],
            ["training.global_batch_size=16", "training.micro_batch_size=8", "4 data-parallel ranks"],
        ),
        (1, ["training.micro_batch_size=6"], ["training.global_batch_size=16", "training.micro_batch_size=6"]),
        (1, ["training.micro_batch_size=32"], ["training.global_batch_size=16", "training.micro_batch_size=32"]),
    ],
)
def test_rules_of_the_world(world_size: int, overrides: list[str], parts: list[str]) -> None:
    load_config(None, overrides)  # nothing is wrong with the configuration alone
    text = message(*overrides, world_size=world_size)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (8, 2, 2), (2, 2, 1)])
def test_worlds_that_fit(world_size: int, tensor: int, pipeline: int) -> None:
    sizes = [f"parallel.tensor_model_parallel_size={tensor}", f"parallel.pipeline_model_parallel_size={pipeline}"]
    load_config(None, sizes, world_size)


def test_null_takes_its_default_from_another_key() -> None:
    config = load_config(
        None, ["model.hidden_size=384", "model.num_attention_heads=6", "data.sequence_length=64", "objective.horizon=3"]
    )
    assert (config.model.query_groups, config.predictor_hidden_size, config.max_position_embeddings) == (6, 384, 64)
    assert (config.model.ffn_size, config.objective.steps_ahead) == (1024, 3)
    given = ["model.num_query_groups=2", "predictor.hidden_size=8", "model.ffn_hidden_size=10"]
    config = load_config(None, [*given, "model.max_position_embeddings=999"])
    assert (config.model.query_groups, config.predictor_hidden_size, config.model.ffn_size) == (2, 8, 10)
    assert config.max_position_embeddings == 999


@pytest.mark.parametrize(
    ("hidden", "expected"), [(384, 1024), (768, 2048), (512, 1408), (2048, 5504), (256, 640), (8, 128)]
)
def test_feed_forward_width_is_the_papers(hidden: int, expected: int) -> None:
    assert swiglu_ffn_hidden_size(hidden) == expected


def test_arithmetic_of_steps_and_padding() -> None:
    config = load_config(None, ["training.train_tokens=8193", "model.vocab_size=4097"])
    assert (config.tokens_per_step, config.total_steps) == (16 * 256, 3)  # rounded up to whole global batches
    assert load_config(None, ["training.train_tokens=8192"]).total_steps == 2
    assert (config.model.padded_vocab_size, RunConfig().model.padded_vocab_size) == (4224, 4096)
    tensor = load_config(None, ["model.vocab_size=4097", "parallel.tensor_model_parallel_size=4"])
    assert tensor.model.padded_vocab_size == 4224  # never depends on the layout
