"""Bad steps are skipped on all ranks, in every layout, as if their batch had never been; too many lead back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.errors import UserError
from nextlat_dist.training.health.bad_steps import add_range
from nextlat_dist.training.health.guards import robust_zscore
from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one-rank": (1, {"zero_stage": 0}, "fp32"),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 1}, "fp32"),
    "dp2-zero1": (2, {"zero_stage": 1}, "fp32"),
    "dp2-zero1-bf16": (2, {"zero_stage": 1}, "bf16"),
    "dp2-zero2": (2, {"zero_stage": 2}, "fp32"),
    "dp2-zero3": (2, {"zero_stage": 3}, "fp32"),
    "pp2-zero0": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 0}, "fp32"),
    "pp2-bf16": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 1}, "bf16"),
}
SLOW_LAYOUTS = {"dp2-zero1", "dp2-zero2", "pp2-zero0"}  # the others have each of their parts
WINDOW = 4
EMPTY = "no target"
GOOD, NAN, SPIKE, LOSS = "good", "gradient is NaN", "gradient explodes", "loss is NaN"
LAST_TERM = "the last term is NaN"
POISONED = [EMPTY, LOSS, *[GOOD] * WINDOW, NAN, GOOD, EMPTY, SPIKE, GOOD, SPIKE, NAN, EMPTY, GOOD]


def guarded_steps(raw: dict[str, Any], sequences: list[list[str]]) -> list[list[tuple[str, str, str]]]:
    """(reason, loss, gradient norm) of steps of these kinds on this rank; good step i trains on the rows of seed i."""
    from nextlat_dist.objective.terms import term_counts
    from nextlat_dist.parallel.dims import all_reduce_sum
    from nextlat_dist.training.engine.build import build_engine
    from nextlat_dist.training.health.guards import StepGuard
    from nextlat_dist.training.health.signals import StopRequest

    config, dims = jobs.set_up(raw)
    found = []
    for kinds in sequences:
        engine = build_engine(config, dims)
        kind = poison(engine, last_rank=dims.rank == dims.world_size - 1)
        guard = StepGuard(config.guards, config.objective, dims, engine, [], StopRequest())
        steps, good = [], 0
        for kind[0] in kinds:
            rows = jobs.ragged_rows(8, seed=good if kind[0] == GOOD else 99).chunk(dims.data_size)[dims.data_rank]
            if kind[0] == EMPTY:
                rows.message[:, 2 * rows.width : 3 * rows.width] = 0  # the loss mask
            counts = all_reduce_sum(term_counts(rows, config.objective), dims.data_group)
            verdict = guard.step(rows.split(config.training.micro_batch_size), counts)
            steps.append((verdict.reason, repr(verdict.loss), repr(verdict.gradient_norm)))  # to the bit, NaN too
            good += kind[0] == GOOD
        found.append(steps)
    return found


def poison(engine: Any, *, last_rank: bool) -> list[str]:
    """Make `engine` take steps of the kind that the returned list holds."""
    kind = [GOOD]
    train_step = engine.train_step

    def poisoned_step(micro_batches: list[Any], weights: torch.Tensor, judge: Any, meanwhile: Any) -> torch.Tensor:
        def poisoned_judge(sums: torch.Tensor, share: torch.Tensor) -> Any:
            # Of one rank alone: the others must hear of it.
            sums = sums * (math.nan if kind[0] == LOSS and last_rank else 1.0)
            if kind[0] == LAST_TERM:
                sums[-1] = math.nan
            return judge(sums, share)

        factor = {NAN: math.nan, SPIKE: 1e4}.get(kind[0], 1.0)
        poisoned: torch.Tensor = train_step(micro_batches, weights * factor, poisoned_judge, meanwhile)
        return poisoned

    engine.train_step = poisoned_step
    return kind


@pytest.fixture(scope="module")
def first_loss(one_rank: Ranks) -> float:
    """Of the first good step, on one rank."""
    (((first,),),) = one_rank.run(guarded_steps, jobs.tiny_config(training={"micro_batch_size": 2}), [[GOOD]])
    return float(first[1])


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_LAYOUTS else ()) for name in LAYOUTS]
)
def test_what_follows_a_bad_step_is_as_if_it_had_never_been(
    layout: str, first_loss: float, request: pytest.FixtureRequest
) -> None:
    size, parallel, precision = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[size])
    raw = jobs.tiny_config(
        parallel=parallel,
        training={"precision": precision, "micro_batch_size": 2},
        guards={"spike_zscore": 100.0, "window_steps": WINDOW},
    )
    results = ranks.run(guarded_steps, raw, [POISONED, [GOOD] * POISONED.count(GOOD)])
    poisoned, clean = results[0]
    assert all(one == results[0] for one in results), "ranks judge differently"
    assert [step for step in poisoned if not step[0]] == clean
    assert float(clean[0][1]) == pytest.approx(first_loss, rel=1e-5 if precision == "fp32" else 1e-2)
    reasons = dict(zip(POISONED, (reason for reason, *_ in poisoned), strict=True))
    assert reasons[LOSS] == "loss is nan"
    assert reasons[NAN].startswith("gradient norm is ")
    assert reasons[SPIKE].startswith("gradient norm ")
    assert reasons[SPIKE].endswith("above guards.spike_zscore=100")
    assert [bool(reason) for reason, *_ in poisoned] == [kind != GOOD for kind in POISONED]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_term_that_is_not_finite_makes_a_step_bad_only_by_its_weight(weight: float, one_rank: Ranks) -> None:
    raw = jobs.tiny_config(model={"num_layers": 1}, objective={"lambda_kl": weight}, training={"micro_batch_size": 2})
    ((((reason, loss, _),),),) = one_rank.run(guarded_steps, raw, [[LAST_TERM]])
    assert (reason, math.isfinite(float(loss))) == (("", True) if weight == 0 else ("loss is nan", False))


@given(st.lists(st.floats(1, 10), min_size=3, max_size=50), st.floats(1.5, 5))
def test_zscore_knows_no_unit_and_rises(history: list[float], factor: float) -> None:
    value = max(history) * 2
    score = robust_zscore(value, history)
    assert score > 0
    assert robust_zscore(value * factor, [one * factor for one in history]) == pytest.approx(score)
    assert robust_zscore(value * factor, history) > score


def test_zscore_by_hand() -> None:
    assert robust_zscore(10.0, [1, 2, 3, 4, 100]) == pytest.approx((10 - 3) / 1.4826)
    assert robust_zscore(2.0, [2.0] * 9) == 0
    assert robust_zscore(2.002, [2.0] * 9) == pytest.approx(1.0)  # the spread is never less than a thousandth


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("guards", "spike_zscore", -1), ("guards", "window_steps", 0), ("guards", "max_bad_steps", -1),
     ("watchdog", "timeout_seconds", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(section: str, key: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{section}.{key} is {value}"):
        config_from_dict({section: {key: value}})


def test_ranges_are_joined() -> None:
    ranges: list[list[int]] = []
    for first, end in ((4, 8), (12, 16), (16, 20), (8, 24), (30, 32)):
        add_range(ranges, first, end)
    assert ranges == [[4, 24], [30, 32]]


def poisoned_training(raw: dict[str, Any], bad_calls: set[int], factor: float = math.nan) -> str:
    """Train, with the gradient times `factor` in the n-th step from now for n in `bad_calls`. What it ends with."""
    from nextlat_dist.training.engine.deepspeed_engine import DeepSpeedEngine as Engine

    original = Engine.train_step
    calls = 0

    def poisoned(self: Engine, micro_batches: Any, weights: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(self, micro_batches, weights * (factor if calls in bad_calls else 1.0), *rest)

    Engine.train_step = poisoned  # type: ignore[method-assign]
    try:
        run_training(raw)
    except UserError as error:
        return str(error)
    finally:
        Engine.train_step = original  # type: ignore[method-assign]
    return ""


def events(output: Path, kind: str) -> list[tuple[int, dict[str, Any]]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[kind]) for line in lines if kind in line]


def configured(output: Path, dataset: Path, max_bad_steps: int, steps: int = 9) -> dict[str, Any]:
    raw = training_config(output, dataset, {"zero_stage": 1}, {"train_tokens": steps * 4 * 48, "validation_batches": 0})
    raw["guards"] = {"max_bad_steps": max_bad_steps, "spike_zscore": 1e9}
    return raw


def state(output: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / f"checkpoints/step_{step:08d}/trainer_state.json").read_text())
    return found


def test_skipped_rows_are_in_the_log_and_in_checkpoints(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    two_ranks.run(poisoned_training, configured(tmp_path, text_dataset, 3, steps=6), {2, 4, 5})
    assert not events(tmp_path, "rewound"), "three bad steps, but not in a row"
    assert sorted(logged(tmp_path)) == [1, 3, 6]
    found = events(tmp_path, "skipped_step")
    assert [step for step, _ in found] == [2, 4, 5]
    assert found[0][1]["rows"] == [4, 8]
    assert found[0][1]["source_rows"] == {"train": [4, 8]}
    assert found[0][1]["reason"] == "gradient norm is inf"
    assert found[0][1]["gradient_norm"] == "inf"
    assert found[0][1]["loss"] > 0
    assert [state(tmp_path, step)["skipped"] for step in (3, 6)] == [[[4, 8]], [[4, 8], [12, 20]]]
    assert [state(tmp_path, step)["optimizer_step"] for step in (3, 6)] == [2, 3]


def test_too_many_bad_steps_lead_back_to_the_last_checkpoint(
    tmp_path: Path, text_dataset: Path, two_ranks: Ranks
) -> None:
    back, left_out, cut = tmp_path / "back", tmp_path / "left_out", tmp_path / "cut"
    two_ranks.run(poisoned_training, configured(back, text_dataset, 2), {5, 6})
    assert events(back, "rewound") == [(6, {"to_step": 3, "rows": [12, 24], "source_rows": {"train": [12, 24]}})]
    assert state(back, 9)["skipped"] == [[12, 24]]
    # A run whose steps 4 to 6 were all left out has the weights of step 3 at step 6.
    two_ranks.run(poisoned_training, configured(left_out, text_dataset, 0), {4, 5, 6})
    after = {step: line for step, line in logged(back).items() if step > 6}
    assert sorted(after) == [7, 8, 9]
    assert after == {step: line for step, line in logged(left_out).items() if step > 6}
    assert state(back, 9)["recent"] == state(left_out, 9)["recent"]
    # Killed after the last checkpoint and resumed: it goes back again.
    shutil.copytree(back / "checkpoints" / "step_00000003", cut / "checkpoints" / "step_00000003")
    (cut / "checkpoints" / "latest").write_text("step_00000003\n")
    two_ranks.run(poisoned_training, configured(cut, text_dataset, 2), {2, 3})
    assert {step: line for step, line in logged(cut).items() if step > 6} == after
    assert state(cut, 9)["skipped"] == [[12, 24]]


def test_training_that_does_not_go_on_ends_with_a_sentence(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    (sentence,) = one_rank.run(poisoned_training, configured(tmp_path / "early", text_dataset, 2), {1, 2})
    assert "2 steps in a row up to step 2 were bad and there is no checkpoint yet to go back to" in sentence
    assert "look at rows 0 to 8" in sentence
    raw = configured(tmp_path / "late", text_dataset, 1)
    (sentence,) = one_rank.run(poisoned_training, raw, {4, 5})
    assert "1 steps in a row up to step 5 were bad and so they were since step 3 before" in sentence


def test_spikes_are_measured_by_the_steps_before_a_resume(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    raw = configured(tmp_path, text_dataset, 0, steps=3)
    raw["guards"] = {"spike_zscore": 1000.0, "window_steps": 2}
    one_rank.run(poisoned_training, raw, set())
    lines = logged(tmp_path)
    recent = [value for step in (2, 3) for value in (lines[step]["loss"], lines[step]["gradient_norm"])]
    assert [value for pair in state(tmp_path, 3)["recent"] for value in pair] == pytest.approx(recent, rel=1e-12)
    raw["training"]["train_tokens"] = 5 * 4 * 48
    one_rank.run(poisoned_training, raw, {1}, 1e6)
    assert [step for step, _ in events(tmp_path, "skipped_step")] == [4]
    assert state(tmp_path, 5)["skipped"] == [[12, 16]]
