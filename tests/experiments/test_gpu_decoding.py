"""The GPU benchmark from end to end with a toy on a CPU: every stage runs, one JSON has it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nextlat_dist.config.load import load_config
from nextlat_dist.experiments import gpu_decoding
from nextlat_dist.experiments.gpu_decoding import CONFIG, SAFETY, SCALES, package_folders, tokens_that_fit
from nextlat_dist.plan.counting import parameter_counts

ROOT = Path(__file__).resolve().parents[2]


def test_the_model_has_more_than_100_million_parameters() -> None:
    assert parameter_counts(load_config(ROOT / CONFIG))["base"] > 100e6


def test_tokens_that_fit() -> None:
    """Whole steps in what is left, and a few of them however late it is."""
    scale = SCALES["gpu"]
    per_step = 64 * 512
    fits = tokens_that_fit(scale, ROOT / CONFIG, [], 100_000.0, 300.0 + scale.reserved_seconds)
    assert fits % per_step == 0
    assert SAFETY * 300.0 * 100_000 - per_step < fits <= SAFETY * 300.0 * 100_000
    assert tokens_that_fit(scale, ROOT / CONFIG, [], 100_000.0, 10.0) == scale.least_steps * per_step


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert package_folders("there_is_no_such_package") == []
    (folder,) = package_folders("nextlat_dist")
    assert (Path(folder) / "cli.py").is_file()


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_decoding.main(["--config", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("["))
    assert line.startswith("error: cannot read the config")


@pytest.mark.slow
def test_everything_at_toy_scale(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nextlat_dist.experiments.gpu_decoding", "--scale", "tiny", "--minutes", "0.5"]
    command += ["--draft-vocabulary", "300", "--output", str(tmp_path / "out"), "model.num_layers=3"]
    environment = {**os.environ, "NEXTLAT_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, env=environment)
    content = json.loads((tmp_path / "out" / "gpu_decoding.json").read_text())
    summary = content["summary"]
    assert {"speedup_adaptive", "sampled_speedup_adaptive", "draft_cost", "verify_cost_2", "seconds"} <= set(summary)
    assert summary["draft_cost"] == summary["b1_draft_cost"]
    assert summary["verify_cost_4"] == summary["b1_verify_cost_4"]
    assert summary["plain_step_seconds"] == summary["b1_plain_step_seconds"]
    assert summary["train_tokens"] >= SCALES["tiny"].least_steps * 4 * 32
    assert summary["greedy_identical"]
    assert str(tmp_path) not in json.dumps(content)
    assert [row["stage"] for row in content["stages"]][-3:] == ["export", "calibration", "decoding"]
    resolved = load_config(tmp_path / "out" / "run" / "config.yaml")
    assert resolved.model.num_layers == 3
    assert [source.name for source in resolved.data.train_sources] == ["stdlib", "packages"]
    assert json.loads((tmp_path / "out" / "export" / "export_report.json").read_text())["draft_vocabulary_size"] == 300
    assert not (tmp_path / "out" / "probe").exists()
    assert "decoding" in result.stdout
