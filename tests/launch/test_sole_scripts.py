"""Scripts with a folder of their own: one at a time, and none removes what a run still writes.

Set-up and the commands are stand-ins. Command: `pytest tests/launch/test_sole_scripts.py`.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.kit.launch.checkout import Project, assert_one_sentence


@pytest.fixture
def prepared(project: Project) -> Project:
    """Set-up is done, and `nextlat` is the stand-in."""
    project.add_real_venv()
    (project.root / "launch/setup.sh").write_text("echo setup >>calls.log\n")
    project.add_command("nextlat", '#!/bin/sh\nexec python -m nextlat_dist.cli "$@"\n')
    project.add_command("nextlat-data", '#!/bin/sh\necho "data $*" >>calls.log\nexit 9\n')
    # The scripts put the virtual environment first, unless it is there.
    path = f"{project.root}/commands:{project.root}/.venv/bin:{project.environment['PATH']}"
    project.environment["PATH"] = path
    for name in ("quickstart", "speculative"):
        export = project.root / f"runs/{name}/nextlat/export"
        export.mkdir(parents=True)
        (export / "model.safetensors").write_text("of an earlier run")
    return project


def content(folder: Path) -> dict[str, bytes | None]:
    """Of every file; None for a folder. The virtual environment, a link, is not followed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", ["quickstart", "speculative"])
def test_a_second_start_changes_nothing(prepared: Project, name: str) -> None:
    lock = prepared.root / f".cache/{name}.lock"
    lock.parent.mkdir()
    with lock.open("w") as file:
        file.write("host first, pid 7\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        before = content(prepared.root)
        result = prepared.run(f"launch/{name}.sh")
        assert_one_sentence(result, f"another {name}", "host first, pid 7", "wait for it or stop it")
        assert content(prepared.root) == before
    assert prepared.run(f"launch/{name}.sh").returncode == 9, "the first command, which fails here"
    assert (prepared.root / "calls.log").read_text() == f"setup\ndata stdlib --output runs/{name}\n"
    assert "host first" not in lock.read_text()


def test_what_a_killed_start_left_running_holds_the_lock(prepared: Project) -> None:
    prepared.add_command("nextlat-data", "#!/bin/sh\necho $$ >.pid && mv .pid data.pid\nexec sleep 60\n")
    process = prepared.start("launch/speculative.sh")
    left = prepared.root / "data.pid"
    while not left.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.wait(timeout=60)
    try:
        assert_one_sentence(prepared.run("launch/speculative.sh"), "what a killed one started", f"pid {process.pid}")
    finally:
        os.kill(int(left.read_text()), signal.SIGKILL)
    process.communicate(timeout=60)


def test_quickstart_keeps_the_folder_of_a_run_that_lives(prepared: Project) -> None:
    before = content(prepared.root / "runs")
    result = prepared.run("launch/quickstart.sh", DOCTOR_SAYS="1")
    assert_one_sentence(result, "runs/quickstart stays as it is")
    assert content(prepared.root / "runs") == before
    asked = json.loads((prepared.root / "doctor.json").read_text())
    assert asked == ["--quick", "--strict", "--config", "configs/quickstart.yaml", "output_dir=runs/quickstart"]
    assert prepared.run("launch/quickstart.sh").returncode == 9
    assert not (prepared.root / "runs/quickstart").exists(), "nobody writes there any more"


def test_speculative_leaves_exports_to_the_command_that_knows_them(prepared: Project) -> None:
    """`nextlat export` replaces what it wrote and refuses anything else."""
    run = prepared.root / "runs/speculative"
    for folder in ("data/validation", "prompts"):
        (run / folder).mkdir(parents=True)
    (run / "data/validation/manifest.json").write_text("{}")
    (run / "prompts/a.jsonl").write_text("{}\n" * 12)
    (prepared.root / "launch/single_node.sh").write_text("exit 0\n")
    prepared.add_command("nextlat", '#!/bin/sh\necho "nextlat $*" >>calls.log\nexit 9\n')
    before = content(run / "nextlat")
    assert prepared.run("launch/speculative.sh").returncode == 9
    assert "nextlat export " in (prepared.root / "calls.log").read_text()
    assert content(run / "nextlat") == before
