"""A grid of real runs, end to end: trained, exported, evaluated, interrupted, resumed, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.grids import write_grid

PROGRAM = (
    "import argparse, sys\n"
    "from nextlat_dist.experiments.command import add_command\n"
    "from nextlat_dist.errors import UserError\n"
    "parser = argparse.ArgumentParser(); add_command(parser.add_subparsers())\n"
    "options = parser.parse_args()\n"
    "try:\n"
    "    options.run_command(options)\n"
    "except UserError as error:\n"
    "    sys.exit(f'error: {error}')\n"
)


def start(grid: Path, *more: object) -> subprocess.Popen[str]:
    command = ["ablate", "--config", grid, "--output", grid.parent / "out", "--jobs", 2]
    command += ["--json", grid.parent / "ablations.json", "--pictures", grid.parent, *more]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == status, (output, errors)
    return output, errors


@pytest.mark.slow
def test_a_grid_is_run_interrupted_resumed_and_compared(tmp_path: Path) -> None:
    grid, out = (
        write_grid(
            tmp_path,
            variants={
                "both": {},
                "broken": {"data.validation": "nowhere"},
                "neither": {"objective.name": "next_token"},
            },
        ),
        tmp_path / "out",
    )
    first = start(grid)
    while not (out / "cells" / "both" / "seed-3" / "run" / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert finish(first, first.wait(timeout=100))[0] == ""  # no table of half a grid
    assert first.returncode != 0
    assert not (out / "cells" / "both" / "seed-3" / "export.done").exists()

    _, errors = finish(start(grid), 1)
    assert "3 cells, 0 of them finished before" in errors
    assert "broken, seed 3: train ended with status 2: error: " in errors
    assert "failed: broken, seed 3, at train; see cells/broken/seed-3/train.log" in errors
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["both", "neither"]
    assert content["summary"]["cells_failed"] == 1
    both, neither = content["rows"]
    logged = [json.loads(line) for line in (out / "cells/both/seed-3/run/metrics.jsonl").read_text().splitlines()]
    assert both["training/kl"] == logged[-1]["kl"]
    measured = json.loads((out / "cells/both/seed-3/task.json").read_text())["summary"]
    assert both["task/model_latent_rnn_1x"] == measured["model_latent_rnn_1x"]
    assert "task/model_latent_rnn_1x" not in neither
    assert (tmp_path / "ablations.png").stat().st_size > 10_000

    # A finished cell is not run again, a changed one is, and what it does not change of another stays.
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/train.done")}
    write_grid(tmp_path, variants={"both": {}, "neither": {"objective.name": "next_token", "optimizer.lr": 1e-4}})
    _, errors = finish(start(grid), 0)
    assert "2 cells, 1 of them finished before" in errors
    after = {path: path.stat().st_mtime_ns for path in before}
    assert [path.parts[-3] for path in before if after[path] != before[path]] == ["neither"]
