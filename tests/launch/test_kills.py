"""Whatever process of a run is killed: no rank is left over, the script does not call it a success, and no second run
starts next to the first.

DeepSpeed's launcher and torchrun are real; the ranks are stand-ins that watch their launchers as the real ones do, but
for the last test, which trains.
Command: `pytest tests/launch/test_kills.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.kit.launch.checkout import Project
from tests.kit.launch.namespaces import Site
from tests.kit.launch.starting import starts, wait_for
from tests.kit.processes import descendants, running

ORPHAN_SECONDS = 10


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


# A part of each process's command line.
SINGLE_NODE = {
    "runner": "bin/deepspeed ",
    "launcher": "deepspeed.launcher.launch ",
    "rank": "-u -m nextlat_dist.cli ",
}
TORCHRUN = {"agent": "from torch.distributed import run", "rank": "-m nextlat_dist.cli "}
CASES = [
    ("single_node.sh", "script", 1),
    ("single_node.sh", "runner", 1),
    ("single_node.sh", "launcher", 1),
    pytest.param("single_node.sh", "rank", 1, marks=pytest.mark.slow),
    pytest.param("torchrun.sh", "script", 1, marks=pytest.mark.slow),
    ("torchrun.sh", "agent", 1),
    pytest.param("torchrun.sh", "rank", 1, marks=pytest.mark.slow),
    pytest.param("single_node.sh", "launcher", 2, marks=pytest.mark.slow),
    pytest.param("single_node.sh", "runner", 2, marks=pytest.mark.slow),
]


def kill(process: subprocess.Popen[str], name: str, parts: dict[str, str]) -> None:
    if name == "script":
        process.kill()
        return
    [first, *_] = [pid for pid in descendants(process.pid) if parts[name] in command_of(pid)]
    os.kill(first, signal.SIGKILL)


def left_over(tree: list[int]) -> dict[int, str]:
    """What is there of these after ten seconds."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(running(pid) for pid in tree) and time.monotonic() < deadline:
        time.sleep(0.1)
    return {pid: command_of(pid) for pid in tree if running(pid)}


@pytest.mark.parametrize(("script", "name", "times"), CASES)
def test_nothing_is_left_over(project: Project, script: str, name: str, times: int) -> None:
    """`times` starts are allowed: after the last there must be none."""
    project.add_real_venv()
    words = ["watched=yes", "waits=once" if times == 2 else "wait=yes"]
    process = project.start(f"launch/{script}", "run.yaml", *words, MAX_RESTARTS=str(times - 1))
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    tree = descendants(process.pid)
    kill(process, name, SINGLE_NODE if script == "single_node.sh" else TORCHRUN)
    assert left_over(tree) == {}
    _, errors = process.communicate(timeout=60)
    if times == 1:
        assert process.returncode != 0, errors
        assert starts(project) == ["2"]
    else:  # the second start comes after the end of the first, and ends well
        assert process.returncode == 0, errors
        assert starts(project) == ["2", "2"]
    assert not list(Path("/tmp").glob(f"nextlat-*{process.pid}*"))


def test_a_killed_quickstart_leaves_no_training(project: Project) -> None:
    """Nothing waits for the training any more: its ranks save and stop. Quickstart, reproduce and speculative are such
    scripts."""
    project.add_real_venv()
    caller = "source launch/processes.sh; name_caller; bash launch/single_node.sh run.yaml watched=yes wait=yes; true"
    process = project.start("-c", caller)
    wait_for([project.root / f"report.{rank}" for rank in range(2)], process)
    tree = descendants(process.pid)
    process.kill()
    assert left_over(tree) == {}
    assert [(project.root / f"stopped.{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]
    assert "the script that started this one was killed" in process.communicate(timeout=60)[1]
    for name in ("quickstart", "reproduce", "speculative"):
        assert "\nname_caller\n" in (project.root / f"launch/{name}.sh").read_text()


def test_a_clean_end_is_believed(project: Project) -> None:
    project.add_real_venv()
    result = project.run("launch/single_node.sh", "run.yaml", "watched=yes", MAX_RESTARTS="0")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("skipped", ["", "1"], ids=["doctor", "no doctor"])
def test_a_launcher_that_ends_well_before_any_rank_began_is_not_believed(project: Project, skipped: str) -> None:
    """DeepSpeed's runner ends with 0 when its launcher was killed."""
    project.add_real_venv()
    project.add_command("deepspeed", "#!/bin/sh\nexit 0\n")
    ranks = project.root / "launch/ranks.sh"
    ranks.write_text(ranks.read_text() + f'\nexport PATH="{project.root}/commands:$PATH"\n')
    result = project.run(
        "launch/single_node.sh", "run.yaml", "watched=yes", MAX_RESTARTS="0", NEXTLAT_SKIP_DOCTOR=skipped
    )
    assert result.returncode == 137, result.stderr
    assert "no rank said that the run did" in result.stderr


def test_asked_to_stop_before_any_rank_began(project: Project) -> None:
    """Nothing was lost: the same command begins. The launcher's own end on SIGTERM would end other runs' launchers."""
    project.add_real_venv()
    project.add_command("deepspeed", "#!/bin/sh\ntrap 'touch asked' TERM\ntouch there\nsleep 60 & wait\nsleep 60\n")
    ranks = project.root / "launch/ranks.sh"
    ranks.write_text(ranks.read_text() + f'\nexport PATH="{project.root}/commands:$PATH"\n')
    process = project.start("launch/single_node.sh", "run.yaml", "watched=yes")
    wait_for([project.root / "there"], process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert not (project.root / "asked").exists()


STEPS = 100  # enough that the run is not over when it is killed; test_two_hosts has the other kinds of processes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text_dataset: Path) -> Path:
    """A real run of two ranks that was left alone."""
    site = Site(tmp_path_factory.mktemp("whole"), text_dataset)
    output = site.configure("whole", {"zero_stage": 1}, steps=STEPS, save_interval=5)
    site.here("whole", 2)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("single_node.sh", "launcher"),
        ("single_node.sh", "rank"),
        ("torchrun.sh", "script"),
        ("torchrun.sh", "agent"),
    ],
)
def test_a_restart_gives_the_weights_of_a_run_left_alone(
    script: str, name: str, whole: Path, tmp_path: Path, text_dataset: Path
) -> None:
    site = Site(tmp_path, text_dataset)
    cut = site.configure("cut", {"zero_stage": 1}, steps=STEPS, save_interval=5)
    metrics, output = cut / "metrics.jsonl", tmp_path / "output.txt"
    with site.running_here("cut", 2, script=script, MAX_RESTARTS="0") as process:
        while not metrics.is_file() or '"step": 7,' not in metrics.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.05)
        tree = descendants(process.pid)
        kill(process, name, SINGLE_NODE if script == "single_node.sh" else TORCHRUN)
        assert process.wait(timeout=60) != 0
        assert left_over(tree) == {}
    with site.running_here("cut", 2, script=script) as process:
        assert process.wait(timeout=240) == 0, output.read_text()
    text = output.read_text()
    assert "resumed at step" in text
    assert "steps of this run are done" not in text  # it was over before anything was killed
    final = Path(f"checkpoints/step_{STEPS:08d}")
    names = [path.relative_to(whole) for part in ("weights", "optimizer") for path in (whole / final / part).iterdir()]
    assert len(names) >= 2
    for path in names:
        assert (whole / path).read_bytes() == (cut / path).read_bytes(), path
