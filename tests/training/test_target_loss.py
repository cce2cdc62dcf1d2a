"""`training.target_loss`: a run ends, whole, at the validation that reaches it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config import load_config
from nextlat_dist.errors import UserError
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config


def run(raw: dict[str, Any]) -> tuple[int, bool]:
    """(steps, whether it says that it was stopped)."""
    from nextlat_dist.training.run import train
    from tests.kit import jobs

    config, _ = jobs.set_up(raw)
    result = train(config)
    return result.steps, result.stopped


def with_target(raw: dict[str, Any], target: float | None) -> dict[str, Any]:
    return {**raw, "training": {**raw["training"], "target_loss": target}}


def validations(output: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[f"validation_{name}"] for line in lines if f"validation_{name}" in line}


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"pipeline_model_parallel_size": 2, "zero_stage": 1}])
def test_a_run_ends_at_the_validation_that_reaches_it(
    tmp_path: Path, text_dataset: Path, two_ranks: Ranks, parallel: dict[str, Any]
) -> None:
    training = {"validation_interval": 2, "log_interval": 3}
    raw = training_config(tmp_path / "whole", text_dataset, parallel, training)
    two_ranks.run(run_training, raw)
    whole = validations(tmp_path / "whole", "next_token")
    assert list(whole) == [2, 4, 6]
    # Between the validations at 2 and at 4: the run ends at 4, which is neither a logged nor a saved step otherwise.
    target = (whole[2] + whole[4]) / 2
    assert whole[4] < target < whole[2]
    cut = {**raw, "output_dir": str(tmp_path / "cut")}
    assert two_ranks.run(run, with_target(cut, target)) == [(4, False)] * 2
    assert validations(tmp_path / "cut", "next_token") == {step: whole[step] for step in (2, 4)}
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").glob("step_*"))[-1] == "step_00000004"
    assert list(logged(tmp_path / "cut")) == [1, 2, 3, 4]
    # Started again it has nothing to do; with another target it resumes, as if it had never ended.
    assert two_ranks.run(run, with_target(cut, target)) == [(4, False)] * 2
    assert two_ranks.run(run, with_target(cut, None)) == [(6, False)] * 2
    assert validations(tmp_path / "cut", "next_token") == whole


def test_of_bst_it_is_the_loss_that_decoding_has(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    training = {"validation_interval": 1, "train_tokens": 2 * 4 * 192}
    raw = training_config(tmp_path / "run", text_dataset, {"zero_stage": 1}, training)
    raw["objective"] = {"name": "bst", "pair_rate": 0.05}
    raw["data"]["sequence_length"] = 192  # documents end in the rows
    two_ranks.run(run_training, raw)
    decoded, pairs = (validations(tmp_path / "run", name)[1] for name in ("decoded", "next_token"))
    assert decoded != pairs
    between = with_target({**raw, "output_dir": str(tmp_path / "between")}, (decoded + pairs) / 2)
    assert two_ranks.run(run, between)[0][0] == (1 if decoded < pairs else 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["training.validation_interval is 0"]),
        ({"training.validation_interval": 5, "training.validation_batches": 0}, ["training.validation_batches is 0"]),
        ({"training.validation_interval": 5}, ["data.validation is not set"]),
    ],
)
def test_it_is_refused_where_nothing_is_validated(settings: dict[str, Any], words: list[str]) -> None:
    given = ["training.target_loss=0.5", *(f"{key}={value}" for key, value in settings.items())]
    with pytest.raises(UserError) as caught:
        load_config(None, given)
    assert all(word in str(caught.value) for word in ("training.target_loss=0.5", *words))
