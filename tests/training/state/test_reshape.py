"""A checkpoint of any layout resumes in any other: the same weights and moments to the byte, the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.training.runs import assert_same_state, go_on, train_and_save

SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {"zero_stage": 0}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 1}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 0}),
    "tp2-pp2": (4, {**SEQUENCE, "pipeline_model_parallel_size": 2, "zero_stage": 1}),
    "dp2-zero1": (2, {"zero_stage": 1}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "dp4-zero0": (4, {"zero_stage": 0}),
}


def raw_config(layout: str, **sections: Any) -> dict[str, Any]:
    return jobs.tiny_config(parallel=LAYOUTS[layout][1], training={"micro_batch_size": 2}, **sections)


def pool(layout: str, request: pytest.FixtureRequest) -> Ranks:
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[LAYOUTS[layout][0]])
    return ranks


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, one_rank: Ranks, two_ranks: Ranks, four_ranks: Ranks
) -> dict[str, tuple[Path, list[dict[str, float]]]]:
    """A checkpoint of every layout, and the metrics of the steps after it."""
    pools = {1: one_rank, 2: two_ranks, 4: four_ranks}
    found = {}
    for layout, (size, _) in LAYOUTS.items():
        root = tmp_path_factory.mktemp(layout)
        found[layout] = (root, pools[size].run(train_and_save, raw_config(layout), root)[0])
    return found


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("sources", ["neighbours", pytest.param("all", marks=pytest.mark.slow)])
def test_any_layout_goes_on_from_any_other(
    sources: str,
    target: str,
    saved: dict[str, tuple[Path, list[dict[str, float]]]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    names = list(saved)
    if sources == "neighbours":  # in a ring, three apart: each layout is read by another kind
        names = [names[(names.index(target) + step) % len(names)] for step in (3, 4)]
    for source in names:  # a job each: the ranks start afresh after a few, and what a layout left behind is gone
        root, output = saved[source][0], tmp_path / source
        after = pool(target, request).run(go_on, raw_config(target), root, output)[0]
        assert_same_state(root, output)
        for expected, found in zip(saved[source][1], after, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), source
            assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3), source
