"""Stages and the short run, with a small program instead of `nextlat`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.experiments import budget
from nextlat_dist.experiments.budget import Stages, logged, nextlat, probe

# Half a second of other work, then a line per step: half of the speed in the first half, which does not count.
PROGRAM = """
import json, pathlib, sys, time
if sys.argv[1] != "train":
    sys.exit(3)
given = dict(word.split("=", 1) for word in sys.argv[4:])
run = pathlib.Path(given["output_dir"])
run.mkdir()
time.sleep(0.5)
steps = int(given["training.train_tokens"]) // 4096
assert given["training.log_interval"] == "1"
lines = [{"loss": 1.0, "tokens_per_second": 100_000 if step < steps // 2 else 200_000} for step in range(steps)]
(run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in [*lines, {"validation_loss": 1.0}]))
"""


@pytest.fixture(autouse=True)
def _program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "NEXTLAT", (sys.executable, "-c", PROGRAM))


def test_the_short_run_tells_speed_and_what_a_run_takes_besides(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("{}")  # 16 rows of 256 tokens a step
    speed, overhead = probe(config, ["optimizer.lr=0.1"], tmp_path / "probe", 8)
    assert speed == pytest.approx(200_000)
    assert 0.3 < overhead < 60
    assert not (tmp_path / "probe").exists()


def test_a_command_that_fails_is_named_with_its_status() -> None:
    with pytest.raises(UserError, match=r"^nextlat export ended with status 3; its reason is above$"):
        nextlat("export", "--output", Path("x"))


def test_stages_are_told_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages.stage("graphs"):
        pass
    with pytest.raises(RuntimeError), stages.stage("broken"):
        raise RuntimeError
    assert [row["stage"] for row in stages.rows] == ["graphs"]
    assert 0 <= stages.rows[0]["seconds"] <= stages.passed
    assert [line.split() for line in stages.table().splitlines()] == [["stage", "seconds"], ["graphs", "0.0"]]
    assert capsys.readouterr().err.splitlines() == ["[0 s] graphs", "[0 s] broken"]


def test_lines_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert [line["step"] for line in logged(tmp_path)] == [1, 2]
