"""The steps of a cell: their commands, what their keys depend on, and the numbers that are collected."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nextlat_dist.experiments import cell as cells
from nextlat_dist.experiments.cell import collect, finished, make_data, steps_of, steps_together, summary_names
from nextlat_dist.experiments.grid import DerivedExport, Evaluation, Grid, GridCell, cells_of, read_grid
from nextlat_dist.experiments.processes import Processes, locked
from nextlat_dist.experiments.steps import Step, run_step
from tests.kit.grids import write_grid


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return read_grid(write_grid(tmp_path))


@pytest.fixture
def cell(grid: Grid, tmp_path: Path) -> GridCell:
    return cells_of(grid, grid.seeds, tmp_path / "out")[0]


def keys(cell: GridCell, grid: Grid, output: Path) -> dict[str, str]:
    return {step.name: step.key for step in steps_of(cell, grid, output)}


def finish(cell: GridCell, grid: Grid, output: Path, contents: dict[Path, str]) -> None:
    """Give the cell these files, each by the step that is to write it."""
    write = "import pathlib, sys; path = pathlib.Path(sys.argv[1]); path.parent.mkdir(parents=True, exist_ok=True); "
    for step in steps_of(cell, grid, output):
        assert not finished(cell, grid, output)
        (path,) = [path for path in contents if any(path.is_relative_to(written) for written in step.outputs)]
        command = (sys.executable, "-c", write + "path.write_text(sys.argv[2])", str(path), contents[path])
        cell.directory.mkdir(parents=True, exist_ok=True)
        with locked(cell.directory) as lock:
            run_step(replace(step, command=command), cell.directory, Processes(lock, 1))


def test_commands_of_a_cell(cell: GridCell, grid: Grid, tmp_path: Path) -> None:
    out, where = tmp_path / "out", tmp_path / "out" / "cells" / "both" / "seed-3"
    commands = [list(step.command[2:]) for step in steps_of(cell, grid, out)]
    evaluate = ["evaluate", "task", "--export", f"model={where}/export", "--data", f"{out}/data/test"]
    assert commands == [
        ["nextlat_dist.cli", "train", "--config", f"{where}/config.yaml"],
        ["nextlat_dist.cli", "export", "--checkpoint", f"{where}/run/checkpoints", "--output", f"{where}/export"],
        ["nextlat_dist.cli", *evaluate, "--json", f"{where}/task.json"],
    ]


def test_keys_follow_what_decides_a_result(cell: GridCell, grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = keys(cell, grid, out)
    moved = replace(cell, config=replace(cell.config, output_dir="elsewhere"))
    assert keys(moved, grid, out) == before
    longer = replace(cell, config=replace(cell.config, optimizer=replace(cell.config.optimizer, lr=0.5)))
    assert not keys(longer, grid, out).items() & before.items()
    evaluation = grid.evaluations["task"]
    asked = replace(evaluation, arguments=(*evaluation.arguments, "--seed", "1"))
    other = keys(cell, replace(grid, evaluations={"task": asked}), out)
    assert [name for name in before if other[name] != before[name]] == ["task"]
    renamed = replace(evaluation, numbers={"another": "number"})
    assert keys(cell, replace(grid, evaluations={"task": renamed}), out) == before
    for split, changed in (("test", ["task"]), ("train", ["train", "export", "task"])):
        (out / "data" / split).mkdir(parents=True)
        (out / "data" / split / "manifest.json").write_text("{}")
        after = keys(cell, grid, out)
        assert [name for name in before if after[name] != before[name]] == changed
        before = after


def test_numbers_of_a_cell(cell: GridCell, grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = '{"next_token": 3.0, "kl": 9}\n{"next_token": 2.0}\n{"epoch": 1}\n'
    contents = {cell.run / "metrics.jsonl": metrics, cell.export / "config.json": "{}"}
    contents[cell.directory / "task.json"] = '{"summary": {"model_transformer_1x": 0.25, "other": 1}}'
    finish(cell, grid, out, contents)
    assert finished(cell, grid, out)
    result = collect(cell, grid, out)  # the last value of each field; what is not there is left out
    assert result.numbers == {"training/next_token": 2.0, "training/kl": 9.0, "task/model_transformer_1x": 0.25}
    assert result.seconds > 0


def test_the_seconds_of_a_step_are_the_median_over_what_was_logged(cell: GridCell, grid: Grid, tmp_path: Path) -> None:
    """100 tokens a step: 2, 1 and 10 seconds."""
    speeds = {1: 50.0, 5: 100.0, 10: 10.0}
    lines = [{"step": step, "tokens": 100 * step, "tokens_per_second": speed} for step, speed in speeds.items()]
    metrics = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 10, "validation_loss": 1.0}])
    asked = replace(grid, training={"step_seconds": "seconds of a step"}, evaluations={})
    finish(cell, asked, tmp_path / "out", {cell.run / "metrics.jsonl": metrics, cell.export / "config.json": "{}"})
    assert collect(cell, asked, tmp_path / "out").numbers == {"training/step_seconds": 2.0}


def test_a_training_that_was_interrupted_resumes_from_its_run(cell: GridCell, grid: Grid, tmp_path: Path) -> None:
    train, *others = steps_of(cell, grid, tmp_path / "out")
    assert train.resumes
    assert not any(step.resumes for step in others)
    assert train.outputs == (cell.run,)
    (text,) = train.inputs.values()
    assert yaml.safe_load(text)["output_dir"] == str(cell.run)


def test_a_launcher_starts_the_training_and_changes_no_key(cell: GridCell, grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    launched = {step.name: step for step in steps_of(cell, grid, out, ["bash", "launch.sh"])}
    assert launched["train"].command == ("bash", "launch.sh", str(cell.directory / "config.yaml"))
    assert {name: step.key for name, step in launched.items()} == keys(cell, grid, out)


def test_all_cells_are_evaluated_together_once_for_what_they_are(tmp_path: Path) -> None:
    arguments = ["task", "--export", "{exports}", "--data", "{data}/test", "--pictures", "{output}"]
    changes = {"runs": "{variant}-{seed}", "together": {"report": arguments}, "training": {}, "evaluations": {}}
    grid = read_grid(write_grid(tmp_path, **changes))
    out = tmp_path / "out"
    cells = cells_of(grid, [3, 4], out)
    (step,) = steps_together(cells, grid, out)
    exports = [f"{name}={out}/{name}-{seed}/export" for seed in (3, 4) for name in ("both", "neither")]
    more = ["--data", f"{out}/data/test", "--pictures", str(out), "--json", f"{out}/report.json"]
    assert list(step.command[3:]) == ["evaluate", "task", "--export", *exports, *more]
    assert [cell.run for cell in cells][:2] == [out / "both-3", out / "neither-3"]
    (fewer,) = steps_together(cells[:2], grid, out)
    (slower,) = steps_together(cells_of(grid, [3, 4], out, ["optimizer.lr=0.5"]), grid, out)
    assert len({step.key, fewer.key, slower.key}) == 3


def test_data_are_made_by_commands_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once for what it and those before it are."""
    program = "import pathlib, sys; at = sys.argv.index('--output'); path = pathlib.Path(sys.argv[at + 1]); "
    program += "path.mkdir() if sys.argv[1] == 'text' else path.write_text(sys.argv[-1])"
    monkeypatch.setattr(cells, "NEXTLAT_DATA", (sys.executable, "-c", program))
    out = tmp_path / "out"
    out.mkdir()

    def make(second: str, third: str) -> list[str]:
        then = {
            "two": ["pieces", "--output", "{data}/two", second],
            "three": ["shard", "--output", "{data}/three", third],
        }
        grid = read_grid(write_grid(tmp_path, data=["text", "--output", "{data}"], then=then))
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.done")}
        with locked(out) as lock:
            make_data(grid, out, Processes(lock, 1))
        return [path.stem for path in sorted(out.glob("*.done")) if path.stat().st_mtime_ns != before.get(path)]

    assert make("b", "c") == ["data", "three", "two"]
    assert make("b", "c") == []
    assert make("b", "C") == ["three"]
    assert make("B", "C") == ["three", "two"]
    assert [(out / "data" / name).read_text() for name in ("two", "three")] == ["B", "C"]


def test_an_evaluation_of_some_variants(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path))
    asked = {"task": replace(grid.evaluations["task"], only=["both"])}
    out, grid = tmp_path / "out", replace(grid, evaluations=asked)
    both, neither = cells_of(grid, [3], out)
    assert [[step.name for step in steps_of(cell, grid, out)] for cell in (both, neither)] == [
        ["train", "export", "task"],
        ["train", "export"],
    ]
    finish(neither, grid, out, {neither.run / "metrics.jsonl": '{"next_token": 2}', neither.export / "c.json": "{}"})
    assert collect(neither, grid, out).numbers == {"training/next_token": 2.0}
    assert summary_names(neither, "task") == []


def test_an_export_made_of_a_cells_own(tmp_path: Path) -> None:
    """It comes between the export and what reads it, and of its arguments only what reads it depends."""
    out, grid = tmp_path / "out", read_grid(write_grid(tmp_path))
    plain = {
        cell.variant: {step.name: step.key for step in steps_of(cell, grid, out)} for cell in cells_of(grid, [3], out)
    }

    def steps(*more: str) -> dict[str, Step]:
        made = {"fitted": DerivedExport(["fit-drafter", "--model", "{export}", *more], ["both"])}
        asked = {
            **grid.evaluations,
            "drafts": Evaluation(["speculative", "--export", "{fitted}"], {"n": "n"}, ["both"]),
        }
        both, neither = cells_of(replace(grid, exports=made, evaluations=asked), [3], out)
        whole = replace(grid, exports=made, evaluations=asked)
        assert {step.name: step.key for step in steps_of(neither, whole, out)} == plain["neither"]
        return {step.name: step for step in steps_of(both, whole, out)}

    found = steps()
    assert list(found) == ["train", "export", "fitted", "task", "drafts"]
    (cell, _) = cells_of(grid, [3], out)
    path = cell.export.with_name("fitted")
    assert found["fitted"].command[-5:] == ("fit-drafter", "--model", str(cell.export), "--output", str(path))
    assert found["fitted"].outputs == (path,)
    assert list(found["drafts"].command[-4:-2]) == ["--export", str(path)]
    assert {name: found[name].key for name in plain["both"]} == plain["both"]
    longer = steps("--steps", "9")
    changed = [name for name in found if found[name].key != longer[name].key]
    assert changed == ["fitted", "drafts"]
