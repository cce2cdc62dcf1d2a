"""The Path-Star benchmark: what fits into its minutes, and all of it with a toy on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.cli import main as data_cli
from nextlat_dist.config.load import load_config
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.evaluation.tasks.data import documents
from nextlat_dist.experiments import path_star
from nextlat_dist.experiments.path_star import CONFIG, IN_A_HURRY, SAFETY, SCALES, steps_that_fit

ROOT = Path(__file__).resolve().parents[2]


def test_steps_that_fit_by_hand() -> None:
    """540 s, of which 60 are for exports and scores and 2 · 15 besides the steps: 450 s for twins at 20 a second."""
    scale = SCALES["gpu"]
    assert scale.reserved_seconds == 60
    assert steps_that_fit(scale, 540.0, 20.0, 15.0) == int(SAFETY * 450 * 20 / 2)
    assert steps_that_fit(scale, 540.0, 20.0, 15.0) / 20 * 2 + 30 + 60 <= 540
    assert steps_that_fit(scale, 60.0, 20.0, 15.0) < 0  # the least steps are trained then


@pytest.mark.parametrize("scale", SCALES)
def test_rows_hold_a_graph(scale: str, tmp_path: Path) -> None:
    """Of the options that the scale has, but for how many are drawn."""
    config = load_config(ROOT / CONFIG, [*IN_A_HURRY, *SCALES[scale].overrides], world_size=1)
    few = ["--train", "4", "--test", "4", "--output", str(tmp_path)]
    assert data_cli(["task", "path-star", *SCALES[scale].graphs, *few]) == 0
    assert read_manifest(open_storage(tmp_path / "train")).tokenizer.vocab_size == config.model.vocab_size
    lengths = {len(document.tokens) for document in documents(tmp_path / "train", None)}
    assert lengths == {config.data.sequence_length + 1}


def test_the_gpu_run_is_the_papers_in_bf16() -> None:
    scale = SCALES["gpu"]
    config = load_config(ROOT / CONFIG, [*IN_A_HURRY, *scale.overrides])
    assert (config.total_steps, config.training.global_batch_size, config.training.precision) == (20_000, 512, "bf16")
    assert scale.graphs[scale.graphs.index("--train") + 1] == "200_000"


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert path_star.main(["--config", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the config")
    assert path_star.main(["--seeds", "0", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --minutes is 9.0 and --seeds 0; give more than 0 minutes")


@pytest.mark.slow
def test_everything_at_toy_scale(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nextlat_dist.experiments.path_star", "--scale", "tiny", "--minutes", "0.2"]
    command += ["--seeds", "2", "--output", str(tmp_path / "out"), "model.num_layers=2"]
    environment = {**os.environ, "NEXTLAT_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, env=environment)
    content = json.loads((tmp_path / "out" / "path_star.json").read_text())
    summary, runs = content["summary"], content["runs"]
    assert summary["steps"] >= SCALES["tiny"].least_steps
    assert summary["paper_steps"] > summary["steps"]
    assert {"gpt_exact_greedy", "nextlat_exact_greedy", "guess_exact_greedy", "seconds"} <= set(summary)
    assert [(run["name"], run["seed"]) for run in runs] == [(n, s) for s in (0, 1) for n in ("gpt", "nextlat")]
    assert {run["steps"] for run in runs} == {summary["steps"]}
    for run in runs:
        config = load_config(tmp_path / "out" / f"{run['name']}-{run['seed']}" / "config.yaml")
        assert (config.training.seed, config.total_steps, config.model.num_layers) == (run["seed"], summary["steps"], 2)
        assert config.objective.name == path_star.OBJECTIVES[run["name"]]
    assert str(tmp_path) not in json.dumps(content)
    assert content["stages"][0]["stage"] == "graphs"
    assert not (tmp_path / "out" / "probe").exists()
    assert "exact_greedy" in result.stdout
