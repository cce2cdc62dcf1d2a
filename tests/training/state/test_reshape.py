"""A checkpoint of any layout goes on in any other: the same weights and moments to the byte, the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, TensorReader
from tests.kit import jobs
from tests.kit.harness import Ranks

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {"zero_stage": 0}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 1}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 0}),
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "zero_stage": 1}),
    "dp2-zero1": (2, {"zero_stage": 1}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "dp4-zero0": (4, {"zero_stage": 0}),
}
STEPS = 3


def start(raw: dict[str, Any]) -> Any:
    from nextlat_dist.training.engine.build import build_engine

    config, dims = jobs.set_up(raw)
    return config, dims, build_engine(config, dims)


def save(config: Any, dims: Any, engine: Any, state: Any, root: Path) -> None:
    from nextlat_dist.training.state.saving import Saver

    saver = Saver(config, dims, engine, root, None)
    saver.save(state)
    assert [outcome.error for outcome in saver.finish()] == [""]
    saver.close()


def train_and_save(raw: dict[str, Any], root: Path) -> list[dict[str, float]]:
    """Metrics of the steps after the checkpoint, without any reshaping."""
    from nextlat_dist.training.state.saving import TrainerState

    config, dims, engine = start(raw)
    jobs.train_steps(engine, config, dims, range(STEPS))
    save(config, dims, engine, TrainerState(step=STEPS), root)
    return jobs.train_steps(engine, config, dims, range(STEPS, 2 * STEPS))


def go_on(raw: dict[str, Any], sources: list[Path], targets: list[Path]) -> list[list[dict[str, float]]]:
    """From each source: load it into this layout, save that, and train on."""
    from nextlat_dist.checkpoint.commit import find_checkpoint
    from nextlat_dist.training.state.saving import read_state, resume_state

    metrics = []
    for source, target in zip(sources, targets, strict=True):
        config, dims, engine = start(raw)
        checkpoint = find_checkpoint(source)
        assert checkpoint is not None
        state = read_state(checkpoint)
        assert (state.step, state.optimizer_step) == (STEPS, STEPS)
        resume_state(dims, engine, checkpoint, state)
        save(config, dims, engine, state, target)
        metrics.append(jobs.train_steps(engine, config, dims, range(STEPS, 2 * STEPS)))
    return metrics


def raw_config(layout: str, **sections: Any) -> dict[str, Any]:
    return jobs.tiny_config(parallel=LAYOUTS[layout][1], training={"micro_batch_size": 2}, **sections)


def tensors(root: Path) -> dict[tuple[str, str], torch.Tensor]:
    with TensorReader(root / f"step_{STEPS:08d}") as reader:
        return {(name, key): reader.full(name, key) for name in reader.names for key in (WEIGHT, *MOMENTS)}


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


def assert_same_state(left: Path, right: Path) -> None:
    before, after = tensors(left), tensors(right)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


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
    roots = [saved[source][0] for source in names]
    outputs = [tmp_path / source for source in names]
    metrics = pool(target, request).run(go_on, raw_config(target), roots, outputs)[0]
    for source, root, output, after in zip(names, roots, outputs, metrics, strict=True):
        assert_same_state(root, output)
        for expected, found in zip(saved[source][1], after, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), source
            assert found["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3), source
