"""launch/slurm.sbatch under a real Slurm: one controller and one node (slurm_site.sh), real training on real text.

Command: `pytest tests/launch/test_slurm.py`.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kit.launch.namespaces import NAMESPACES, Site
from tests.kit.launch.namespaces import why_not as why_no_namespaces
from tests.kit.training.runs import logged

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol", "ip", "unshare")


def why_not() -> str:
    """Why there cannot be a Slurm here; empty when there can."""
    missing = [name for name in NEEDED if shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    return f"not installed: {', '.join(missing)}" if missing else why_no_namespaces()


NO_SLURM = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NO_SLURM), reason=NO_SLURM)]

# Two ranks on the only node, without GPUs.
SUBMIT = """
submit() { sbatch --parsable --nodes=1 --ntasks-per-node=2 --gpus-per-node=0 --cpus-per-task=1 "$@"; }
state() { scontrol show job "$1" | grep -oE 'JobState=[A-Z]+'; }
reach() { until grep -qs "\\"step\\": $2," "$1/metrics.jsonl"; do sleep 0.2; done; }
"""


def run_in_slurm(site: Site, script: str) -> list[str]:
    """The lines that `script` prints, run with a fresh Slurm."""
    directory = site.root / "site"
    directory.mkdir(mode=0o755)
    command = ["bash", str(Path(__file__).with_name("slurm_site.sh")), str(directory), "bash", "-c", SUBMIT + script]
    result = subprocess.run(
        [*NAMESPACES, "--uts", *command],
        cwd=site.root,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(site.root), "RESTART_SECONDS": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    logs = "\n".join(path.read_text() for path in site.root.glob("slurm-*.log"))
    assert result.returncode == 0, result.stdout + result.stderr + logs
    return result.stdout.splitlines()


@pytest.fixture
def site(tmp_path: Path, text_dataset: Path) -> Site:
    return Site(tmp_path, text_dataset)


def test_job_saves_before_its_time_limit_and_goes_on_after_the_requeue(site: Site) -> None:
    """The signal is the one that Slurm sends to the batch script before the limit."""
    output = site.configure("run", {"zero_stage": 1}, steps=60)
    printed = run_in_slurm(
        site,
        """
        job="$(submit launch/slurm.sbatch run.yaml)"
        reach run 3
        scancel --batch --signal=USR1 "$job"
        until [[ "$(state "$job")" == *COMPLETED || "$(state "$job")" == *FAILED ]]; do sleep 0.3; done
        state "$job"
        scontrol show job "$job" | grep -oE 'Restarts=[0-9]+'
        """,
    )
    assert printed == ["JobState=COMPLETED", "Restarts=1"]
    log = (site.root / "slurm-1.log").read_text()
    assert "time limit is near: the ranks save and stop" in log
    assert "requeueing job 1" in log
    assert "resumed at step" in log
    assert sorted(logged(output)) == list(range(1, 61)), "no step is missing"


def test_cancelled_job_saves_and_stays_cancelled(site: Site) -> None:
    output = site.configure("run", {"zero_stage": 1}, steps=5000)
    printed = run_in_slurm(
        site,
        """
        job="$(submit launch/slurm.sbatch run.yaml)"
        reach run 3
        scancel "$job"
        until [[ -z "$(squeue --noheader --jobs "$job")" ]]; do sleep 0.3; done
        sleep 8 # it would be back in the queue by then
        state "$job"
        scontrol show job "$job" | grep -oE 'Restarts=[0-9]+'
        """,
    )
    assert printed == ["JobState=CANCELLED", "Restarts=0"]
    assert list((output / "checkpoints").glob("step_*/manifest.json")), "Slurm's SIGTERM reaches the ranks"
