"""A training step on an accelerator, without one: no host read, no tensor of the host, no [s, s], no whole logits."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

OBJECTIVES = {
    "gpt": ["objective.name=next_token"],
    "nextlat": ["objective.name=nextlat", "objective.horizon=2"],
    "mtp": ["objective.name=mtp", "objective.horizon=2"],
    "jtp": ["objective.name=jtp", "objective.horizon=2"],
    "detached": ["objective.name=nextlat", "objective.horizon=2", "objective.detach_base=true"],
}
SEQUENCE = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
PIPELINE = ["parallel.pipeline_model_parallel_size=4", "model.num_layers=6"]
CASES: dict[str, list[str]] = {
    **{
        f"{name}-tp{size}": [*overrides, f"parallel.tensor_model_parallel_size={size}"]
        for name, overrides in OBJECTIVES.items()
        for size in (1, 2, 8)
    },
    "nextlat-d8": ["objective.name=nextlat", "objective.horizon=8"],
    "grouped-queries": [*OBJECTIVES["nextlat"], "model.num_query_groups=4"],
    "tied": [*OBJECTIVES["nextlat"], "model.tie_embeddings=true"],
    "free-gradients": [
        *OBJECTIVES["nextlat"], "objective.stop_gradient_head=false", "objective.stop_gradient_target=false"
    ],
    **{f"{name}-sequence": [*overrides, *SEQUENCE] for name, overrides in OBJECTIVES.items()},
    "selective": [*OBJECTIVES["nextlat"], *SEQUENCE, "training.recompute=selective"],
    **{f"{name}-pipeline": [*overrides, *PIPELINE] for name, overrides in OBJECTIVES.items()},
    "tied-sequence-pipeline": [*OBJECTIVES["nextlat"], *PIPELINE, *SEQUENCE, "model.tie_embeddings=true"],
    "full": [*OBJECTIVES["nextlat"], *SEQUENCE, "training.recompute=full"],
}  # fmt: skip
MISTAKES = {"item": "host_reads", "cpu-index": "mixed", "dense-mask": "dense"}
CLEAN = {"host_reads": [], "mixed": [], "collectives_on_host": [], "dense": [], "without_gradient": 0}


def findings(ranks: int, cases: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.kit.meta_step", str(ranks), json.dumps(cases)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    cases = {name: ("none", overrides) for name, overrides in CASES.items()}
    planted = {name: (name, OBJECTIVES["nextlat"]) for name in (*MISTAKES, "whole-logits")}
    return dict(zip([*cases, *planted], findings(8, [*cases.values(), *planted.values()]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_and_nothing_is_whole(case: str, found: dict[str, dict[str, Any]]) -> None:
    result = dict(found[case])
    rows = result.pop("rows_of_logits")
    assert result == CLEAN
    assert 0 < max(rows.values()) <= 1024 + 8


def test_of_1024_ranks() -> None:
    (result,) = findings(1024, [("none", [*CASES["nextlat-sequence"], "parallel.zero_stage=1"])])
    assert {key: result[key] for key in CLEAN} == CLEAN


@pytest.mark.parametrize(("mistake", "kind"), MISTAKES.items())
def test_mistakes_are_found(mistake: str, kind: str, found: dict[str, dict[str, Any]]) -> None:
    assert found[mistake][kind]


def test_whole_logits_are_found(found: dict[str, dict[str, Any]]) -> None:
    assert found["whole-logits"]["rows_of_logits"]["float32"] == 4 * 1280
