"""What a grid's file may say, and the cells that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.experiments.ablate import ablate
from nextlat_dist.experiments.grid import cells_of, read_grid
from tests.experiments.test_ablations import write_grid

CONFIGS = Path(__file__).parents[2] / "configs" / "ablations"


def test_cells_go_seed_by_seed_with_the_variants_settings(tmp_path: Path) -> None:
    settings = {"data.train": "{data}/train", "optimizer.lr": 1e-4}  # a variant's own come after them
    variants = {"a b": {}, "c": {"optimizer.lr": 1e-5, "objective.horizon": 1}}
    grid = read_grid(write_grid(tmp_path, settings=settings, variants=variants))
    cells = cells_of(grid, [5, 7], tmp_path / "out")
    assert [(cell.variant, cell.seed) for cell in cells] == [("a b", 5), ("c", 5), ("a b", 7), ("c", 7)]
    first, second, *_ = cells
    assert first.directory == tmp_path / "out" / "cells" / "a-b" / "seed-5"
    assert [(c.config.optimizer.lr, c.config.objective.horizon) for c in (first, second)] == [(1e-4, 2), (1e-5, 1)]
    assert {c.config.training.seed for c in cells} == {5, 7}
    assert first.config.data.train == str(tmp_path / "out" / "data" / "train")
    assert first.config.output_dir == str(first.directory / "run")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"variant": {}}, ["unknown key 'variant'", "'variants'"]),
        ({"variants": {}}, ["0 variants"]),
        ({"training": {}, "evaluations": {}}, ["0 numbers to collect"]),
        ({"variants": ["both"]}, ["variants is ['both']", "mapping"]),
        ({"seeds": [0, 0]}, ["seeds is [0, 0]", "once"]),
        ({"seeds": 3}, ["seeds is 3", "list"]),
        ({"seeds": [True]}, ["seeds is [True]"]),
        ({"evaluations": {"task": {"arguments": "task"}}}, ["evaluation task", "'numbers' is missing"]),
        ({"evaluations": {"task": {"arguments": "task", "numbers": {}}}}, ["'task'", "list of words"]),
        ({"evaluations": {"export": {"arguments": [], "numbers": {}}}}, ["evaluation export", "rename"]),
        ({"variants": {"x": {"objective.horizn": 1}}}, ["variant x", "objective.horizon"]),
        ({"variants": {"x": {"parallel.tensor_model_parallel_size": 2}}}, ["variant x", "1 ranks"]),
        ({"variants": {"a b": {}, "a-b": {}}}, ["'a b' and 'a-b'", "rename one"]),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        ablate(write_grid(tmp_path, **changes), tmp_path / "out")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    grid, other = write_grid(tmp_path), tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(UserError, match="is no grid's directory"):
        ablate(grid, other)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match="--jobs is 0"):
        ablate(grid, tmp_path / "out", jobs=0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_grids_of_the_project_can_be_run(path: Path, tmp_path: Path) -> None:
    grid = read_grid(path)
    assert len(grid.seeds) >= 3
    assert len(cells_of(grid, grid.seeds, tmp_path)) == len(grid.seeds) * len(grid.variants)
