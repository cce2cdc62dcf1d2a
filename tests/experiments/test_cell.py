"""Steps with real processes: what is kept, what is run again, what failed, and when processes end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nextlat_dist.errors import UserError
from nextlat_dist.experiments import cell as cells
from nextlat_dist.experiments.cell import Step, StepFailed, collect, finished, steps_of
from nextlat_dist.experiments.grid import Cell, Grid, cells_of, read_grid
from nextlat_dist.experiments.processes import Processes, locked
from tests.experiments.test_ablations import write_grid


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    return read_grid(write_grid(tmp_path))


@pytest.fixture
def cell(grid: Grid, tmp_path: Path) -> Cell:
    return cells_of(grid, grid.seeds, tmp_path / "out")[0]


def keys(cell: Cell, grid: Grid, output: Path) -> dict[str, str]:
    return {step.name: step.key for step in steps_of(cell, grid, output)}


def run(step: Step, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory) as lock:
        cells._run(step, directory, Processes(lock, 1))


def python(code: str, key: str = "k") -> Step:
    return Step("step", (sys.executable, "-c", code), key)


def test_commands_of_a_cell(cell: Cell, grid: Grid, tmp_path: Path) -> None:
    out, where = tmp_path / "out", tmp_path / "out" / "cells" / "both" / "seed-3"
    commands = [list(step.command[2:]) for step in steps_of(cell, grid, out)]
    evaluate = ["evaluate", "task", "--export", f"model={where}/export", "--data", f"{out}/data/test"]
    assert commands == [
        ["nextlat_dist.cli", "train", "--config", f"{where}/config.yaml"],
        ["nextlat_dist.cli", "export", "--checkpoint", f"{where}/run/checkpoints", "--output", f"{where}/export"],
        ["nextlat_dist.cli", *evaluate, "--json", f"{where}/task.json"],
    ]


def test_keys_follow_what_decides_a_result(cell: Cell, grid: Grid, tmp_path: Path) -> None:
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


def test_a_finished_step_has_a_stamp_and_a_failed_one_a_log(tmp_path: Path) -> None:
    run(python("print('done')"), tmp_path)
    stamp = cells._stamp(tmp_path, python(""))
    assert stamp is not None
    assert stamp["seconds"] > 0
    assert cells._stamp(tmp_path, python("", key="another")) is None
    with pytest.raises(StepFailed, match=r"^step ended with status 3: why$") as caught:
        run(python("import sys; print('why'); sys.exit(3)", key="next"), tmp_path)
    assert caught.value.log.read_text() == "done\nwhy\n"
    assert cells._stamp(tmp_path, python("", key="next")) is None


def test_a_training_goes_on_only_under_its_own_key(cell: Cell) -> None:
    checkpoint = cell.directory / "run" / "checkpoint"
    for key, kept in (("a", False), ("a", True), ("b", False)):
        cells._prepare_training(cell, python("", key=key))
        assert checkpoint.exists() == kept, key
        assert yaml.safe_load((cell.directory / "config.yaml").read_text())["output_dir"] == str(cell.directory / "run")
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.touch()


def test_numbers_of_a_cell(cell: Cell, grid: Grid, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (cell.directory / "run").mkdir(parents=True)
    (cell.directory / "run" / "metrics.jsonl").write_text(
        '{"next_token": 3.0, "kl": 9}\n{"next_token": 2.0}\n{"epoch": 1}\n'
    )
    (cell.directory / "task.json").write_text('{"summary": {"model_transformer_1x": 0.25, "other": 1}}')
    for step in steps_of(cell, grid, out):
        assert not finished(cell, grid, out)
        run(replace(step, command=(sys.executable, "-c", "")), cell.directory)
    assert finished(cell, grid, out)
    result = collect(cell, grid, out)  # the last value of each field; what is not there is left out
    assert result.numbers == {"training/next_token": 2.0, "training/kl": 9.0, "task/model_transformer_1x": 0.25}
    assert result.seconds > 0


def test_stopping_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    with locked(tmp_path) as lock, (tmp_path / "log").open("wb") as log:
        processes = Processes(lock, 1)
        statuses: list[int] = []
        code = "import time; print('up', flush=True); time.sleep(100)"
        thread = threading.Thread(target=lambda: statuses.append(processes.run((sys.executable, "-c", code), log)))
        thread.start()
        while not (tmp_path / "log").read_text():
            time.sleep(0.01)
        processes.stop()
        thread.join(timeout=60)
        assert statuses == [-signal.SIGTERM]
        assert processes.run((sys.executable, "-c", ""), log) == -1


def test_cores_are_shared_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])")
    for given, expected in ((None, str(max(1, len(os.sched_getaffinity(0)) // 2))), ("7", "7")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with locked(tmp_path) as lock, (tmp_path / "log").open("wb") as log:
            assert Processes(lock, 2).run(code, log) == 0
        assert (tmp_path / "log").read_text().strip() == expected


def test_the_lock_outlives_a_grid_that_left_a_process(tmp_path: Path) -> None:
    code = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)")
    with (tmp_path / "log").open("wb") as log:
        with locked(tmp_path) as lock:
            processes = Processes(lock, 1)
            thread = threading.Thread(target=processes.run, args=(code, log))
            thread.start()
            while not (tmp_path / "log").read_bytes():
                time.sleep(0.01)
        with pytest.raises(UserError, match="another grid, or a process that one left behind"), locked(tmp_path):
            pass
        processes.stop()
        thread.join(timeout=60)
    with locked(tmp_path):
        pass
