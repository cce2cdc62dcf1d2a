"""Commands of this checkout, run as a reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kit.pages import ROOT


def run(directory: Path, *command: str, timeout: float = 300) -> str:
    """Standard output of a command in a directory where `nextlat` and `nextlat-data` are those of this checkout."""
    programs = directory / ".programs"
    if not programs.is_dir():
        programs.mkdir()
        for name, module in (("nextlat", "nextlat_dist.cli"), ("nextlat-data", "data_tools.cli")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
            (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout
