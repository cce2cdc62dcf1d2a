"""The number of GPUs: doctor and launch scripts count what CUDA shows. Command: `pytest tests/doctor/test_gpus.py`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nextlat_dist.doctor.gpus import visible_gpus
from tests.kit.launch.checkout import CHECKOUT

EIGHT = "".join(f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-0000000{n})\n" for n in range(8))
MIG = (
    "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c)\n"
    "  MIG 3g.20gb     Device  0: (UUID: MIG-GPU-5c89852c/1/0)\n"
    "  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-5c89852c/2/0)\n"
)
CASES = [
    (EIGHT, None, 8),
    (EIGHT, "0,1,2,3,4,5,6,7", 8),
    (EIGHT, "0", 1),
    (EIGHT, " 2 , 3", 2),
    (EIGHT, "GPU-00000003", 1),
    (EIGHT, "GPU-00000003,5", 2),
    (EIGHT, "GPU-9", 0),
    (EIGHT, "", 0),
    (EIGHT, "-1", 0),
    (EIGHT, "NoDevFiles", 0),
    (EIGHT, "none", 0),
    (EIGHT, "1,8,2", 1),  # up to the first that is none
    (EIGHT, "1,-1,2", 1),
    (EIGHT, "3,3", 0),
    (MIG, None, 1),
    (MIG, "MIG-GPU-5c89852c/2/0", 1),
    (MIG, "0", 1),
    ("", None, 0),
    ("GPU 0: something\n", None, 1),
]


@pytest.mark.parametrize(("listing", "choice", "count"), CASES, ids=lambda value: str(value)[:24])
def test_both_count_as_cuda(listing: str, choice: str | None, count: int, tmp_path: Path) -> None:
    assert len(visible_gpus(listing, choice)) == count
    (tmp_path / "listing").write_text(listing)
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\ncat "{tmp_path}/listing"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **({} if choice is None else {"CUDA_VISIBLE_DEVICES": choice})}
    script = f'set -euo pipefail; source "{CHECKOUT}/launch/env.sh"; echo "${{#gpus[@]}} ${{DS_ACCELERATOR-gpu}}"'
    shown = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(count), "gpu" if count else "cpu"]
