"""A throw-away project root for the launch scripts: their files, and a `nextlat_dist.cli` that only reports.

Invariant: no test touches the checkout's own .venv, and none needs a network, a GPU, pdsh or Slurm.
"""

import os
import shutil
from pathlib import Path

import pytest

from tests.kit.launch.checkout import CHECKOUT, Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """No GPU, no Slurm, no procps, whatever the machine has; commands added by a test come first on the PATH."""
    shutil.copytree(CHECKOUT / "launch", tmp_path / "launch")
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    (tmp_path / "run.yaml").write_text("{}\n")
    dropped = ("SLURM_", "PIP_", "DS_", "MASTER_", "NPROC", "PYTHON", "CUDA_", "OMP_", "TORCH_", "RANK", "WORLD_SIZE")
    dropped += ("NNODES", "RDZV_", "LOCAL_", "MAX_RESTARTS", "NEXTLAT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environment["PATH"] = f"{tmp_path / 'commands'}:{environment['PATH']}"
    environment["HOME"] = str(tmp_path)
    environment["RESTART_SECONDS"] = "0"
    made = Project(tmp_path, environment)
    made.add_command("nvidia-smi", "#!/bin/sh\nexit 9\n")
    for name in ("pgrep", "pkill"):  # a slim image has neither
        made.add_command(name, "#!/bin/sh\nexit 127\n")
    return made
