"""A replicated weight that acts on sharded heads has, under every layout, the gradient that one rank has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kit import jobs
from tests.kit.harness import Ranks

NAME = "tests.kit.partial_objective:ENTRY"
WEIGHT = "heads_norm.weight"
TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "tp2-zero0": (2, {**TP2, "zero_stage": 0}, "fp32"),
    "tp2-zero1": (2, {**TP2, "zero_stage": 1}, "fp32"),
    "tp2-zero1-bf16": (2, {**TP2, "zero_stage": 1}, "bf16"),
    "tp2-dp2-zero2": (4, {**TP2, "zero_stage": 2}, "fp32"),
    "tp2-dp2-zero3": (4, {**TP2, "zero_stage": 3}, "fp32"),
    "tp2-pp2-zero0": (4, {**TP2, "pipeline_model_parallel_size": 2, "zero_stage": 0}, "fp32"),
    "tp2-pp2-zero1": (4, {**TP2, "pipeline_model_parallel_size": 2, "zero_stage": 1}, "fp32"),
}


def steps(raw: dict[str, Any]) -> dict[str, Any] | None:
    from nextlat_dist.config.entries import OBJECTIVES

    OBJECTIVES.allow(NAME)
    return jobs.first_steps(raw, steps=2)


def configured(parallel: dict[str, int], precision: str) -> dict[str, Any]:
    # Clipped, so that every gradient depends on the norm.
    return jobs.tiny_config(
        objective={"name": NAME},
        parallel=parallel,
        training={"precision": precision, "micro_batch_size": 2},
        optimizer={"clip_grad": 0.05},
    )


@pytest.fixture(scope="module")
def alone(one_rank: Ranks) -> dict[str, Any]:
    found = one_rank.run(steps, configured({"zero_stage": 0}, "fp32"))[0]
    assert found is not None
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_that_of_one_rank(layout: str, alone: dict[str, Any], request: pytest.FixtureRequest) -> None:
    size, parallel, precision = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    found = ranks.run(steps, configured(parallel, precision))[0]
    assert found["gradients"].keys() == alone["gradients"].keys()
    assert alone["gradients"][WEIGHT].abs().min() > 0
    tolerance: dict[str, float] = {"rtol": 0.05, "atol": 1e-4} if precision == "bf16" else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(found["gradients"][WEIGHT], alone["gradients"][WEIGHT], **tolerance)
    relative = 2e-2 if precision == "bf16" else 1e-5
    for here, there in zip(found["metrics"], alone["metrics"], strict=True):
        assert here == pytest.approx(there, rel=relative)
