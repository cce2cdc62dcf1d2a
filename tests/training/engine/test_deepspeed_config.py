"""The DeepSpeed settings: ours, the user's raw ones with them, and a sentence where the two contradict."""

from __future__ import annotations

from typing import Any

import pytest

from nextlat_dist.config import load_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError
from nextlat_dist.training.engine.deepspeed_config import deepspeed_config


def config(*overrides: str) -> RunConfig:
    return load_config(None, ["training.micro_batch_size=2", "training.global_batch_size=16", *overrides])


@pytest.mark.parametrize(("data_parallel_size", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_batch_arithmetic(data_parallel_size: int, accumulation: int) -> None:
    settings = deepspeed_config(config(), data_parallel_size)
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == accumulation


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_accumulate_in_fp32(precision: str) -> None:
    settings = deepspeed_config(config(f"training.precision={precision}"), 1)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"
    assert (settings["bf16"]["enabled"], settings["fp16"]["enabled"]) == (precision == "bf16", False)


def test_bf16_communication_is_there_to_be_asked_for() -> None:
    settings = deepspeed_config(config("training.precision=bf16", "training.communication_data_type=bf16"), 1)
    assert (settings["communication_data_type"], settings["data_types"]) == ("bf16", {"grad_accum_dtype": "fp32"})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_who_clips(stage: int) -> None:
    settings = deepspeed_config(config(f"parallel.zero_stage={stage}", "optimizer.clip_grad=0.7"), 1)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_clipping"] == 0.0  # `deepspeed_engine` does, by optimizer.clip_grad


def test_raw_settings_pass_through_with_ours() -> None:
    raw = config(
        "deepspeed.zero_optimization.reduce_bucket_size=1000",
        "deepspeed.wall_clock_breakdown=true",
        "deepspeed.steps_per_print=5",
        "deepspeed.zero_allow_untested_optimizer=false",
    )
    settings = deepspeed_config(raw, 1)
    assert settings["zero_optimization"] == {"reduce_bucket_size": 1000, "stage": 1}
    assert settings["wall_clock_breakdown"] is True
    assert (settings["steps_per_print"], settings["zero_allow_untested_optimizer"]) == (5, False)
    assert raw.deepspeed["zero_optimization"] == {"reduce_bucket_size": 1000}  # what is saved stays the user's


CONTRADICTIONS = [
    ("train_batch_size=32", 32, "training.global_batch_size"),
    ("train_micro_batch_size_per_gpu=4", 4, "training.micro_batch_size"),
    ("gradient_accumulation_steps=2", 2, "training.global_batch_size"),
    ("gradient_clipping=0.1", 0.1, "optimizer.clip_grad"),
    ("zero_optimization.stage=2", 2, "parallel.zero_stage"),
    ("bf16.enabled=true", True, "training.precision"),
    ("fp16.enabled=true", True, "training.precision"),
    ("data_types.grad_accum_dtype=bf16", "bf16", "training.precision"),
    ("communication_data_type=bf16", "bf16", "training.communication_data_type"),
]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("setting", "value", "key"), CONTRADICTIONS, ids=[row[0] for row in CONTRADICTIONS])
def test_contradiction_names_both_keys(setting: str, value: Any, key: str, stage: int) -> None:
    with pytest.raises(UserError) as caught:
        deepspeed_config(config(f"deepspeed.{setting}", f"parallel.zero_stage={stage}"), 1)
    text, path = str(caught.value), setting.partition("=")[0]
    assert text.startswith(f"deepspeed.{path} is {value!r} but {key}")
    assert f"remove deepspeed.{path} and set {key}" in text


def test_agreement_is_no_contradiction() -> None:
    agreeing = ["train_batch_size=16", "zero_optimization.stage=1", "bf16.enabled=false", "gradient_clipping=1.0"]
    settings = deepspeed_config(config(*(f"deepspeed.{setting}" for setting in agreeing)), 1)
    assert settings == deepspeed_config(config(), 1)


@pytest.mark.parametrize(("section", "ours"), [("optimizer", "optimizer"), ("scheduler", "schedule")])
def test_sections_that_are_ours(section: str, ours: str) -> None:
    with pytest.raises(UserError, match=rf"^deepspeed\.{section} is set, but the {ours} section .* remove deepspeed"):
        deepspeed_config(config(f"deepspeed.{section}.type=Adam"), 1)


def test_scalar_instead_of_a_mapping() -> None:
    with pytest.raises(UserError, match=r"^deepspeed\.zero_optimization is 2, it must be a mapping$"):
        deepspeed_config(config("deepspeed.zero_optimization=2"), 1)
