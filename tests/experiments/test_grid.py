"""A grid's file: what is refused, and the cells of a good one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config import RunConfig, config_to_dict, load_config
from nextlat_dist.errors import UserError
from nextlat_dist.experiments.ablate import ablate
from nextlat_dist.experiments.cell import steps_of, steps_together
from nextlat_dist.experiments.field import SCALES
from nextlat_dist.experiments.grid import cells_of, read_grid
from tests.kit.grids import write_grid

CONFIGS = Path(__file__).parents[2] / "configs"


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
        ({"variant": {}}, ["unknown grid key 'variant'", "'variants'"]),
        ({"variants": {}}, ["0 variants"]),
        ({"training": {}, "evaluations": {}}, ["0 numbers to collect"]),
        ({"variants": ["both"]}, ["variants is ['both']", "mapping"]),
        ({"seeds": [0, 0]}, ["seeds is [0, 0]", "once"]),
        ({"seeds": 3}, ["seeds is 3", "list"]),
        ({"seeds": [True]}, ["seeds[0] is True", "int"]),
        ({"evaluations": {"task": {"arguments": ["task"]}}}, ["evaluations.task.numbers is missing"]),
        (
            {"evaluations": {"task": {"arguments": "task", "numbers": {}}}},
            ["evaluations.task.arguments is 'task'", "a list"],
        ),
        ({"evaluations": {"export": {"arguments": [], "numbers": {}}}}, ["evaluations.export", "rename"]),
        ({"together": {"train": []}}, ["together.train", "rename"]),
        ({"then": {"data": []}}, ["then.data", "rename"]),
        ({"then": {"more": ["shard"]}, "together": {"more": ["task"]}}, ["then.more and together.more", "rename one"]),
        (
            {"evaluations": {"task": {"arguments": [], "numbers": {}, "only": ["bothh"]}}},
            ["evaluations.task.only", "'bothh'", "both, neither"],
        ),
        ({"exports": {"run": {"arguments": ["fit-drafter"]}}}, ["exports.run", "rename"]),
        ({"exports": {"task": {"arguments": ["fit-drafter"]}}}, ["exports.task and evaluations.task", "rename one"]),
        (
            {"exports": {"more": {"arguments": ["fit-drafter"], "only": ["none"]}}},
            ["exports.more.only", "'none'", "both, neither"],
        ),
        (
            {
                "exports": {"more": {"arguments": ["fit-drafter"], "only": ["both"]}},
                "evaluations": {"task": {"arguments": ["task", "{more}"], "numbers": {}}},
            },
            ["evaluations.task reads {more}", "exports.more.only leaves out neither"],
        ),
        ({"runs": "{variant}"}, ["runs is {variant}, it must hold both {variant} and {seed}"]),
        ({"data": [["task"]]}, ["data[0] is ['task']", "str, int or float"]),
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
    with pytest.raises(UserError, match="output_dir is elsewhere, it must be the cell's own"):
        ablate(grid, tmp_path / "out", overrides=["output_dir=elsewhere"])


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_grids_of_the_project_can_be_run(path: Path, tmp_path: Path) -> None:
    grid = read_grid(path)
    assert len(grid.seeds) >= 3
    assert len(cells_of(grid, grid.seeds, tmp_path)) == len(grid.seeds) * len(grid.variants)


EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))
FIELDS = [path for path in EXPERIMENTS if path.stem.endswith("_field")]
TWINS = [path for path in EXPERIMENTS if path not in FIELDS and path.stem != "price"]


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_experiments_of_the_project_train_twins_and_report_them_together(path: Path, tmp_path: Path) -> None:
    grid = read_grid(path)
    twins = cells_of(grid, [0], tmp_path)
    assert [cell.run for cell in twins] == [tmp_path / "gpt-0", tmp_path / "nextlat-0"]
    assert [cell.export for cell in twins] == [tmp_path / "gpt-0" / "export", tmp_path / "nextlat-0" / "export"]
    assert [cell.config.objective.name for cell in twins] == ["next_token", "nextlat"]
    gpt, nextlat = (config_to_dict(replace(cell.config, output_dir="")) for cell in twins)
    del gpt["objective"]["name"], nextlat["objective"]["name"]
    base = config_to_dict(_base(path, tmp_path))
    del base["objective"]["name"]
    assert gpt == nextlat == base
    (step,) = steps_together(twins, grid, tmp_path)
    assert step.outputs == (tmp_path / "report.json",)
    assert ("--pictures", str(tmp_path)) in pairwise(step.command)


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: path.stem)
def test_fields_of_the_project_differ_in_the_objective_alone(path: Path, tmp_path: Path) -> None:
    grid = read_grid(path)
    cells = cells_of(grid, [0], tmp_path)
    assert [cell.config.objective.name for cell in cells] == ["next_token", "mtp", "jtp", "bst", "nextlat"]
    assert [cell.variant for cell in cells] == ["gpt", "mtp", "jtp", "bst", "nextlat"]
    equal = [config_to_dict(replace(cell.config, output_dir="")) for cell in cells]
    for config in equal:
        del config["objective"]["name"], config["objective"]["pair_rate"]  # that is bst's own
    assert all(config == equal[0] for config in equal)
    assert set(SCALES["cpu"]) == {path.stem.removesuffix("_field") for path in FIELDS}


def _base(path: Path, output: Path) -> RunConfig:
    """The config of the same name in configs/cpu, with the grid's data."""
    data = [f"data.{use}={output / 'data' / split}" for use, split in (("train", "train"), ("validation", "test"))]
    base = load_config(CONFIGS / "cpu" / path.name, [*data, "training.seed=0"])
    return replace(base, output_dir="")


def test_gpt_and_nextlat_of_the_price_are_those_of_the_field(tmp_path: Path) -> None:
    """So that both commands in one folder share them."""
    field, price = (read_grid(CONFIGS / "experiments" / f"{name}.yaml") for name in ("text_field", "price"))
    of_field, of_price = (
        {
            cell.name: [(step.name, step.key) for step in steps_of(cell, grid, tmp_path)][:2]
            for cell in cells_of(grid, grid.seeds, tmp_path)
        }
        for grid in (field, price)
    )
    shared = of_field.keys() & of_price.keys()
    assert len(shared) == 2 * len(field.seeds)
    assert all(of_field[name] == of_price[name] for name in shared)
    assert (field.data, field.then) == (price.data, price.then)
