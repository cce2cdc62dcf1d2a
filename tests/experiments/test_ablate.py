"""A grid from its cells to its report, a small program instead of `nextlat`; test_ablations runs the real one."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.experiments import cell as cells
from nextlat_dist.experiments.command import add_command
from tests.kit.grids import write_grid

PROGRAM = """
import json, pathlib, sys, yaml
if sys.argv[1] == "train":
    config = yaml.safe_load(open(sys.argv[3]))
    if config["optimizer"]["lr"] == 0.5:
        sys.exit("error: too fast")
    run = pathlib.Path(config["output_dir"])
    run.mkdir()
    loss = config["training"]["seed"] + config["optimizer"]["lr"]
    (run / "metrics.jsonl").write_text(json.dumps({"next_token": loss}))
elif sys.argv[1] == "export":
    pathlib.Path(sys.argv[-1]).mkdir()
elif sys.argv[1] == "evaluate":
    pathlib.Path(sys.argv[-1]).write_text(json.dumps({"summary": {"accuracy": 0.5}}))
"""
EVALUATION = {"task": {"arguments": ["task", "--export", "{export}"], "numbers": {"accuracy": "accuracy"}}}
VARIANTS = {"slow": {"optimizer.lr": 0.25}, "fast": {"optimizer.lr": 0.5}}


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "NEXTLAT", (sys.executable, "-c", PROGRAM))


def ablate(directory: Path, *more: str, **changes: Any) -> None:
    """`nextlat ablate` on a grid with these changes."""
    settings: dict[str, Any] = {"data": [], "training": {"next_token": "L_ntp"}, "evaluations": EVALUATION}
    grid = write_grid(directory, **settings | {"variants": VARIANTS} | changes)
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    files = ["--output", str(directory / "out"), "--json", str(directory / "ablations.json")]
    options = parser.parse_args(["ablate", "--config", str(grid), *files, *more])
    options.run_command(options)


def test_a_failed_cell_is_named_and_what_is_finished_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^1$"):
        ablate(tmp_path, "--seeds", "4,2")
    errors = capsys.readouterr().err
    assert "4 cells, 0 of them finished before" in errors
    assert "failed: fast, seed 2, at train; see cells/fast/seed-2/train.log" in errors
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert [(row["variant"], row["seed"], row["training/next_token"]) for row in content["rows"]] == [
        ("slow", 4, 4.25),
        ("slow", 2, 2.25),
    ]
    assert [(one["variant"], one["seed"], one["step"]) for one in content["failures"]] == [
        ("fast", 4, "train"),
        ("fast", 2, "train"),
    ]
    summary = content["summary"]
    assert (summary["cells_finished"], summary["cells_failed"]) == (2, 2)
    assert (summary["slow/training/next_token/mean"], summary["slow/task/accuracy/n"]) == (3.25, 2)

    repaired = {"slow": VARIANTS["slow"], "fast": {"optimizer.lr": 0.125}}
    ablate(tmp_path, "--seeds", "4,2", variants=repaired)
    assert "4 cells, 2 of them finished before" in capsys.readouterr().err
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["slow", "fast"] * 2
    assert content["failures"] == []


def test_a_number_that_no_cell_has_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = {"slow": VARIANTS["slow"]}
    with pytest.raises(SystemExit, match=r"^1$"):
        ablate(tmp_path, variants=variants, training={"loss": "loss"})
    assert "no cell has training/loss; there are next_token" in capsys.readouterr().err
    ablate(tmp_path, variants=variants)


def test_a_grid_without_a_finished_cell_names_a_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no cell finished; see .*/cells/fast/seed-3/train\.log"):
        ablate(tmp_path, variants={"fast": VARIANTS["fast"]})


LAUNCHER = """
import json, pathlib, sys, yaml
run = pathlib.Path(yaml.safe_load(open(sys.argv[1]))["output_dir"])
run.mkdir()
(run / "metrics.jsonl").write_text(json.dumps({"next_token": yaml.safe_load(open(sys.argv[1]))["optimizer"]["lr"]}))
"""


def test_a_launcher_trains_with_the_settings_of_the_command_line(tmp_path: Path) -> None:
    launcher = shlex.join([sys.executable, "-c", LAUNCHER])
    ablate(tmp_path, "--launcher", launcher, "optimizer.lr=0.0625")  # after those of the variants
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["training/next_token"] for row in content["rows"]] == [0.0625, 0.0625]


def test_cells_are_evaluated_together_and_that_is_said_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "variants": {"slow": VARIANTS["slow"]},
        "training": {},
        "evaluations": {},
        "runs": "{variant}-{seed}",
        "together": {"report": ["task", "--export", "{exports}"]},
    }
    program = PROGRAM + "    print(sys.argv[4], 'is measured')\n"
    cells.NEXTLAT = (sys.executable, "-c", program)  # undone by the fixture
    ablate(tmp_path, **changes)
    said = f"slow={tmp_path}/out/slow-3/export is measured\n"
    assert capsys.readouterr().out == said
    ablate(tmp_path, **changes)
    captured = capsys.readouterr()
    assert captured.out == said
    assert "1 cells, 1 of them finished before" in captured.err
    assert (tmp_path / "out" / "slow-3" / "metrics.jsonl").is_file()
    assert not (tmp_path / "ablations.png").exists()


def test_a_failed_cell_leaves_nothing_to_evaluate_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^1$"):
        ablate(tmp_path, together={"report": ["task", "--export", "{exports}"]})
    assert "failed: fast, seed 3" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()
