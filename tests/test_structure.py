"""The shape of the project: which module may import which, and how large files and folders may be.

The contracts stand in pyproject.toml; `lint-imports` checks them. Here they are broken on purpose, in a copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [LINT, "--no-cache"], cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


def test_the_contracts_are_kept() -> None:
    result = lint(CHECKOUT)
    assert result.returncode == 0, result.stdout
    assert " 0 broken" in result.stdout


def copy(root: Path) -> None:
    for package in ("nextlat_dist", "data_tools"):
        shutil.copytree(CHECKOUT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", root)


@pytest.mark.parametrize(
    ("module", "wrong", "contract"),
    [
        ("nextlat_dist/parallel/dims.py", "nextlat_dist.objective", "Arrows point one way"),
        ("nextlat_dist/errors.py", "nextlat_dist.files", "Arrows point one way"),
        ("nextlat_dist/data/packing.py", "nextlat_dist.config.schema", "Arrows point one way"),
        ("nextlat_dist/data/order.py", "nextlat_dist.data.loader", "No circles"),
        ("nextlat_dist/evaluation/state_model.py", "nextlat_dist.model.attention", "An exported model runs without"),
        ("nextlat_dist/inference/sampling.py", "deepspeed", "An exported model runs without"),
        ("nextlat_dist/huggingface/weights.py", "deepspeed", "Exporting needs neither"),
        ("nextlat_dist/tasks/hmm.py", "torch", "need no torch"),
        ("data_tools/verify.py", "nextlat_dist.inference", "Data tools know data and tasks"),
        ("nextlat_dist/experiments/grid.py", "nextlat_dist.training.loop", "Experiments start commands"),
    ],
    ids=lambda value: value.replace("/", "."),
)
def test_a_wrong_import_breaks_its_contract(tmp_path: Path, module: str, wrong: str, contract: str) -> None:
    copy(tmp_path)
    path = tmp_path / module
    path.write_text(f"{path.read_text()}\n\ndef planted() -> None:\n    import {wrong}  # noqa: F401\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [line for line in result.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), result.stdout


def test_a_package_without_a_layer_is_noticed(tmp_path: Path) -> None:
    copy(tmp_path)
    (tmp_path / "nextlat_dist/misc").mkdir()
    (tmp_path / "nextlat_dist/misc/__init__.py").touch()
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "misc" in result.stdout
