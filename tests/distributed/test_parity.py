"""Every layout gives the single-rank run: gradients of the first step, loss terms and gradient norm of five."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import jobs
from tests.distributed.harness import Ranks

STEPS = 5
TOLERANCE = 1e-5

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, parallel section, training section)
    "accumulation": (1, {"zero_stage": 0}, {"micro_batch_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 0}, {}),
    "tp2-zero3": (2, {"tensor_model_parallel_size": 2, "zero_stage": 3}, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 0}, {"micro_batch_size": 2}),
    "pp2-zero1": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 1}, {}),
    "dp2-zero0": (2, {"zero_stage": 0}, {}),
    "dp2-zero1": (2, {"zero_stage": 1}, {}),
    "dp2-zero2": (2, {"zero_stage": 2}, {}),
    "dp2-zero3": (2, {"zero_stage": 3}, {"micro_batch_size": 1}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 0}, {}),
    "pp2-dp2-zero1": (4, {"pipeline_model_parallel_size": 2, "zero_stage": 1}, {"micro_batch_size": 1}),
}


def _config(horizon: int, parallel: dict[str, Any], training: dict[str, Any], **more: Any) -> dict[str, Any]:
    # Large enough for the biggest activation checkpoint: the reference sees the whole batch at once.
    return jobs.tiny_config(
        objective={"horizon": horizon} | more.get("objective", {}),
        parallel=parallel,
        training=training,
        model=more.get("model", {}),
    )


@pytest.fixture(scope="module")
def reference(one_rank: Ranks) -> dict[int, Any]:
    whole = {"micro_batch_size": 8}
    return {
        horizon: one_rank.run(jobs.first_steps, _config(horizon, {"zero_stage": 0}, whole), STEPS)[0]
        for horizon in (1, 3)
    }


def _assert_equal(result: Any, expected: Any) -> None:
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        difference = (result["gradients"][name] - gradient).norm() / gradient.norm()
        assert difference <= TOLERANCE, f"{name}: {difference:.2e}"
    for step, (ours, theirs) in enumerate(zip(result["metrics"], expected["metrics"], strict=True)):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=TOLERANCE), f"step {step}, {key}"


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_single_rank(
    layout: str, horizon: int, reference: dict[int, Any], request: pytest.FixtureRequest
) -> None:
    size, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    result = ranks.run(jobs.first_steps, _config(horizon, parallel, training), STEPS)[0]
    _assert_equal(result, reference[horizon])


@pytest.mark.parametrize(
    ("objective", "model"),
    [({"name": "next_token"}, {}), ({}, {"tie_embeddings": True}), ({"name": "next_token"}, {"tie_embeddings": True})],
    ids=["next-token", "tied", "tied-next-token"],
)
def test_pipeline_equals_single_rank_for_other_models(
    objective: dict[str, Any], model: dict[str, Any], one_rank: Ranks, four_ranks: Ranks
) -> None:
    more = {"objective": objective, "model": model}
    expected = one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **more), STEPS)[0]
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}
    result = four_ranks.run(jobs.first_steps, _config(2, layout, {}, **more), STEPS)[0]
    _assert_equal(result, expected)


def test_activation_checkpointing_changes_nothing(two_ranks: Ranks, reference: dict[int, Any]) -> None:
    training = {"activation_checkpointing": True}
    result = two_ranks.run(jobs.first_steps, _config(3, {"zero_stage": 2}, training), STEPS)[0]
    _assert_equal(result, reference[3])
