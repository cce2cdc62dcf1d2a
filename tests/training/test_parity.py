"""Every layout gives the single-rank run: gradients of the first step, loss terms and gradient norm of five."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.errors import UserError
from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.training.runs import assert_same_state, go_on, train_and_save

SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
STEPS = 5
TOLERANCE = 1e-5

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, parallel section, training section)
    "accumulation": (1, {"zero_stage": 0}, {"micro_batch_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 0}, {}),
    "tp2-zero3": (2, {"tensor_model_parallel_size": 2, "zero_stage": 3}, {}),
    "sequence": (2, {**SEQUENCE, "zero_stage": 0}, {"micro_batch_size": 2}),
    "sequence-zero3": (2, {**SEQUENCE, "zero_stage": 3}, {}),
    "sequence-pp2": (4, {**SEQUENCE, "pipeline_model_parallel_size": 2, "zero_stage": 1}, {"micro_batch_size": 2}),
    "sequence-dp2": (4, {**SEQUENCE, "zero_stage": 2}, {}),
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


@pytest.mark.parametrize(
    ("layout", "horizon"),
    [pytest.param(layout, 1, marks=() if layout == "tp2-pp2" else pytest.mark.slow) for layout in LAYOUTS]
    + [(layout, 3) for layout in LAYOUTS],
)
def test_layout_equals_single_rank(
    layout: str, horizon: int, reference: dict[int, Any], request: pytest.FixtureRequest
) -> None:
    size, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    result = ranks.run(jobs.first_steps, _config(horizon, parallel, training), STEPS)[0]
    _assert_equal(result, reference[horizon])


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_sequence_parallelism_over_four_ranks(zero_stage: int, one_rank: Ranks, four_ranks: Ranks) -> None:
    heads = {"model": {"num_query_groups": 4}}
    whole = _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **heads)
    parts = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "zero_stage": zero_stage}
    result = four_ranks.run(jobs.first_steps, _config(2, parts, {"micro_batch_size": 2}, **heads), STEPS)[0]
    _assert_equal(result, one_rank.run(jobs.first_steps, whole, STEPS)[0])


@pytest.mark.parametrize(
    ("objective", "model"),
    [
        pytest.param({"name": "next_token"}, {}, id="next-token"),
        pytest.param({}, {"tie_embeddings": True}, id="tied"),
        pytest.param({"name": "next_token"}, {"tie_embeddings": True}, id="tied-next-token", marks=pytest.mark.slow),
    ],
)
def test_pipeline_equals_single_rank_for_other_models(
    objective: dict[str, Any], model: dict[str, Any], one_rank: Ranks, four_ranks: Ranks
) -> None:
    more = {"objective": objective, "model": model}
    expected = one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **more), STEPS)[0]
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}
    result = four_ranks.run(jobs.first_steps, _config(2, layout, {}, **more), STEPS)[0]
    _assert_equal(result, expected)


def test_ablated_objective_equals_single_rank(one_rank: Ranks, two_ranks: Ranks) -> None:
    """No stop-gradients and a head that the divergence alone moves: its shards, and the gradient of the target."""
    free = {"lambda_next_token": 0.0, "stop_gradient_target": False, "stop_gradient_head": False}
    more = {"objective": free}
    expected = one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **more), STEPS)[0]
    layout = {"tensor_model_parallel_size": 2, "zero_stage": 0}
    _assert_equal(two_ranks.run(jobs.first_steps, _config(2, layout, {}, **more), STEPS)[0], expected)


MTP: dict[str, Any] = {"objective": {"name": "mtp", "lambda_mtp": 0.7}}


@pytest.fixture(scope="module")
def mtp_reference(one_rank: Ranks) -> Any:
    return one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **MTP), STEPS)[0]


@pytest.mark.parametrize(
    "layout",
    [layout if layout in ("tp2", "pp2") else pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)
def test_mtp_equals_single_rank(layout: str, mtp_reference: Any, request: pytest.FixtureRequest) -> None:
    size, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    result = ranks.run(jobs.first_steps, _config(2, parallel, training, **MTP), STEPS)[0]
    assert {name for name in result["gradients"] if name.startswith("mtp.")} == {
        f"mtp.layers.{index}.{part}.weight"
        for index in (0, 1)
        for part in (
            *("input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj", "pre_mlp_layernorm"),
            *("mlp.linear_fc1", "mlp.linear_fc2", "final_layernorm"),
        )
    }
    _assert_equal(result, mtp_reference)


JTP: dict[str, Any] = {"objective": {"name": "jtp", "lambda_jtp": 0.7}}


@pytest.fixture(scope="module")
def jtp_reference(one_rank: Ranks) -> Any:
    return one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **JTP), STEPS)[0]


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in ("tp2", "sequence-pp2") else pytest.param(layout, marks=pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_jtp_equals_single_rank(layout: str, jtp_reference: Any, request: pytest.FixtureRequest) -> None:
    size, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    result = ranks.run(jobs.first_steps, _config(2, parallel, training, **JTP), STEPS)[0]
    assert {"fetch.scale", "fetch.relative_bias", "decoder.final_layernorm.weight"} < result["gradients"].keys()
    _assert_equal(result, jtp_reference)


BST: dict[str, Any] = {"objective": {"name": "bst", "lambda_previous": 0.7, "pair_rate": 0.6}}
NO_PIPELINE = [name for name, (_, parallel, _) in LAYOUTS.items() if "pipeline_model_parallel_size" not in parallel]


@pytest.fixture(scope="module")
def bst_reference(one_rank: Ranks) -> Any:
    return one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **BST), STEPS)[0]


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in ("sequence-zero3", "dp2-zero2") else pytest.param(layout, marks=pytest.mark.slow)
        for layout in NO_PIPELINE
    ],
)
def test_bst_equals_single_rank(layout: str, bst_reference: Any, request: pytest.FixtureRequest) -> None:
    """Pairs are drawn by row, so whoever has a row draws the same."""
    size, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    result = ranks.run(jobs.first_steps, _config(2, parallel, training, **BST), STEPS)[0]
    assert {"text_head.linear_fc1", "backward.layers.3.mlp.linear_fc1.weight"} < result["gradients"].keys()
    _assert_equal(result, bst_reference)


RELEASE: dict[str, Any] = {"objective": {"semantics": "release"}}
OF_TWO_ROWS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-zero3": (2, {"tensor_model_parallel_size": 2, "zero_stage": 3}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 1}),
    "dp2": (2, {"zero_stage": 2}),
    "sequence-pp2": (4, {**SEQUENCE, "pipeline_model_parallel_size": 2, "zero_stage": 1}),
}


@pytest.fixture(scope="module")
def release_reference(one_rank: Ranks) -> Any:
    raw = _config(3, {"zero_stage": 0}, {"micro_batch_size": 2, "fused_losses": False}, **RELEASE)
    return one_rank.run(jobs.first_steps, raw, STEPS)[0]


@pytest.mark.parametrize(
    "layout", [layout if layout == "pp2" else pytest.param(layout, marks=pytest.mark.slow) for layout in OF_TWO_ROWS]
)
def test_means_per_micro_batch_are_those_of_one_rank(
    layout: str, release_reference: Any, request: pytest.FixtureRequest
) -> None:
    """The same micro-batches, whoever has them; those of four rows give another loss."""
    size, parallel = OF_TWO_ROWS[layout]
    ranks: Ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[size])
    result = ranks.run(jobs.first_steps, _config(3, parallel, {"micro_batch_size": 2}, **RELEASE), STEPS)[0]
    _assert_equal(result, release_reference)
    other = ranks.run(jobs.first_steps, _config(3, parallel, {"micro_batch_size": 1}, **RELEASE), 1)[0]
    assert other["metrics"][0]["loss"] != pytest.approx(release_reference["metrics"][0]["loss"], rel=1e-4)


def test_bst_in_a_pipeline_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot be used with objective\.name=bst"):
        config_from_dict(_config(2, {"pipeline_model_parallel_size": 2}, {}, **BST))


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"zero_stage": 3, "sequence_parallel": True}], ids=str)
def test_heads_of_jtp_that_do_not_divide(parallel: dict[str, Any], one_rank: Ranks, three_ranks: Ranks) -> None:
    """Six heads give its attention four, which three ranks do not divide: each has all of them."""
    model = {"num_attention_heads": 6, "num_query_groups": 6, "hidden_size": 48, "ffn_hidden_size": 96}
    more = {"objective": JTP["objective"], "model": {**model, "make_vocab_size_divisible_by": 24}}
    whole = _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **more)
    expected = one_rank.run(jobs.first_steps, whole, STEPS)[0]
    layout = {"tensor_model_parallel_size": 3, **parallel}
    _assert_equal(three_ranks.run(jobs.first_steps, _config(2, layout, {}, **more), STEPS)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("training", [{"recompute": "full"}, {"precision": "bf16"}], ids=lambda d: next(iter(d)))
def test_mtp_with_tied_embeddings_in_a_pipeline(training: dict[str, Any], one_rank: Ranks, four_ranks: Ranks) -> None:
    more = {**MTP, "model": {"tie_embeddings": True}}
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}
    expected = one_rank.run(jobs.first_steps, _config(2, {"zero_stage": 0}, {"micro_batch_size": 8}, **more), STEPS)[0]
    result = four_ranks.run(jobs.first_steps, _config(2, layout, training, **more), STEPS)[0]
    if "precision" not in training:
        _assert_equal(result, expected)
    for ours, theirs in zip(result["metrics"], expected["metrics"], strict=True):
        for term in ("loss", "next_token", "mtp"):
            assert ours[term] == pytest.approx(theirs[term], rel=3e-3), term


@pytest.mark.slow
@pytest.mark.parametrize("forth", [True, False], ids=["one to four ranks", "four ranks to one"])
def test_mtp_goes_on_in_another_layout(forth: bool, tmp_path: Path, one_rank: Ranks, four_ranks: Ranks) -> None:
    whole = _config(2, {"zero_stage": 0}, {}, **MTP)
    cut = _config(2, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}, {}, **MTP)
    first, second = ((one_rank, whole), (four_ranks, cut)) if forth else ((four_ranks, cut), (one_rank, whole))
    before, after = tmp_path / "before", tmp_path / "after"
    expected = first[0].run(train_and_save, first[1], before)[0]
    found = second[0].run(go_on, second[1], before, after)[0]
    assert_same_state(before, after)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_activation_checkpointing_changes_nothing(two_ranks: Ranks, reference: dict[int, Any]) -> None:
    training = {"recompute": "full"}
    result = two_ranks.run(jobs.first_steps, _config(3, {"zero_stage": 2}, training), STEPS)[0]
    _assert_equal(result, reference[3])
