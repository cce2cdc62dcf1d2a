"""An objective of somebody else's: a distribution installed into a folder trains, exports, drafts and is compared.

Nothing in the package knows it; it is found through entry points alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

CHECKOUT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "kit" / "third_party"
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "toy-guess"
version = "1.0"

[project.entry-points."nextlat_dist.objectives"]
guess = "toy_entry:GUESS"

[project.entry-points."nextlat_dist.drafters"]
guess = "toy_guess:KIND"

[tool.setuptools]
py-modules = ["toy_entry", "toy_guess"]
"""
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {"zero_stage": 0}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "zero_stage": 1}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "zero_stage": 1}),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the distribution is installed into."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("toy_entry.py", "toy_guess.py"):
        shutil.copy(SOURCE / name, source)
    (source / "pyproject.toml").write_text(PYPROJECT)
    subprocess.run([*PIP, "--target", str(target), str(source)], check=True, capture_output=True, timeout=120)
    return target


def train_with(site: str, raw: dict[str, Any]) -> None:
    sys.path.insert(0, site)
    try:
        run_training(raw)
    finally:
        sys.path.remove(site)


@pytest.fixture(scope="module")
def runs(
    site: Path, tmp_path_factory: pytest.TempPathFactory, text_dataset: Path, one_rank: Ranks, two_ranks: Ranks
) -> Path:
    """A folder with a run of each layout."""
    root = tmp_path_factory.mktemp("runs")
    for name, (size, parallel) in LAYOUTS.items():
        raw = training_config(root / name, text_dataset, parallel, {})
        raw["objective"] = {"name": "guess", "options": {"lambda_guess": 0.75}}
        {1: one_rank, 2: two_ranks}[size].run(train_with, str(site), raw)
    return root


def nextlat(*arguments: str | Path, path: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, CHECKOUT)))}
    command = [sys.executable, "-m", "nextlat_dist.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def exported(runs: Path, site: Path) -> Path:
    checkpoints, export = runs / "tp2" / "checkpoints", runs / "export"
    done = nextlat("export", "--checkpoint", checkpoints, "--output", export, path=(site,))
    assert done.returncode == 0, done.stderr
    return export


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_it_trains_alike_in_every_layout(layout: str, runs: Path) -> None:
    alone, here = logged(runs / "one"), logged(runs / layout)
    assert sorted(here) == sorted(alone) == [1, 2, 3, 4, 5, 6]
    for step, line in here.items():
        assert line["loss"] == pytest.approx(line["next_token"] + 0.75 * line["guess"], rel=1e-9)
        for name in ("loss", "next_token", "guess", "gradient_norm"):
            assert line[name] == pytest.approx(alone[step][name], rel=1e-4)
    assert here[6]["guess"] < here[1]["guess"]


def test_it_is_exported_as_a_plain_llama_with_a_drafter_of_its_own_kind(exported: Path) -> None:
    assert json.loads((exported / "export_report.json").read_text())["max_logit_difference"] < 1e-4
    config = json.loads((exported / "guess" / "config.json").read_text())
    assert (config["speculators_model_type"], config["architectures"]) == ("guess", ["Guess"])
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert not any("guess" in name for name in index["weight_map"])


def test_it_drafts_and_is_compared(exported: Path, site: Path, tmp_path: Path) -> None:
    prompts, measured = tmp_path / "prompts.txt", tmp_path / "speculative.json"
    prompts.write_text("def parse\n")
    options = ["--draft-length", "0,1", "--temperature", "0", "--max-new-tokens", "24", "--prompt-tokens", "8"]
    done = nextlat(
        "evaluate", "speculative", "--export", f"toy={exported}", "--prompts", prompts, *options, "--json", measured,
        path=(site,),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(measured.read_text())
    rows = {row["draft_length"]: row for row in content["rows"] if (row["model"], row["domain"]) == ("toy", "all")}
    assert sorted(rows) == [0, 1]
    assert (rows[0]["accepted_tokens_per_cycle"], content["summary"]["greedy_identical"]) == (0, True)
    assert 0 < rows[1]["accepted_tokens_per_cycle"] <= 1


def test_without_the_distribution_the_names_are_unknown(runs: Path, exported: Path, tmp_path: Path) -> None:
    done = nextlat("export", "--checkpoint", runs / "tp2" / "checkpoints", "--output", tmp_path / "export", path=())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: objective.name is 'guess', it must be one of next_token, nextlat, mtp")
    done = nextlat("generate", "--export", exported, "--prompt", "def", path=())
    assert done.returncode == 2
    assert "there is no drafter kind 'guess'" in done.stderr
