"""A process that ranks are launched by takes them with it, whichever it is; the script learns how the run ended.

Command: `pytest tests/training/health/test_launcher.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextlat_dist.training.health.launcher import launchers, mark_began, mark_checked, mark_end
from tests.kit.processes import running

RANK = """
import os, pathlib, time
from nextlat_dist.training.health.launcher import end_with_launcher
end_with_launcher()
pathlib.Path("rank").write_text(f"{os.getpid()}")
time.sleep(60)
"""
# A launcher starts the next word of its command line and waits for it.
LAUNCHER = (
    "import os, subprocess, sys; number, *rest = sys.argv[1:]\n"
    "open(f'launcher.{number}', 'w').write(str(os.getpid()))\n"
    "sys.exit(subprocess.run(rest).returncode)"
)
STARTED = (
    "import os; from nextlat_dist.checkpoint.run_lock import process_started; "
    "os.environ['NEXTLAT_LAUNCHER'] = f'{os.getpid()}:{process_started(os.getpid())}'\n"
)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Launchers 0 (which stands for the script), 1 and 2, and a rank."""
    command = [sys.executable, "-c", RANK]
    for number in (2, 1, 0):
        command = [sys.executable, "-c", (STARTED if number == 0 else "") + LAUNCHER, str(number), *command]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "RANK": "0"})
    deadline = time.monotonic() + 60
    while not (tmp_path / "rank").exists() or not (tmp_path / "rank").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield process
    for name in ("rank", "launcher.0", "launcher.1", "launcher.2"):
        if running(int((tmp_path / name).read_text())):
            os.kill(int((tmp_path / name).read_text()), signal.SIGKILL)
    process.wait(timeout=30)


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_rank_ends_with_whatever_launched_it(killed: int, tree: subprocess.Popen[bytes], tmp_path: Path) -> None:
    rank = int((tmp_path / "rank").read_text())
    assert running(rank)
    os.kill(int((tmp_path / f"launcher.{killed}").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while running(rank):
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.05)


def test_who_counts() -> None:
    assert launchers({}) == {}, "nobody launched it"
    assert launchers({"RANK": "0", "NEXTLAT_LAUNCHER": "4711:1"}) is None, "the script is gone"
    alone = launchers({"RANK": "0"})
    assert alone is not None
    assert list(alone) == [os.getppid()]
    served = launchers({"RANK": "0", "NEXTLAT_LAUNCHER": "ssh"})
    if served is not None:  # else the tests themselves run under the first process
        assert os.getsid(list(served)[-1]) != os.getsid(0)
        assert all(os.getsid(pid) == os.getsid(0) for pid in list(served)[:-1])


def test_marks(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    environment = {"NEXTLAT_END_MARK": str(mark), "RANK": "8", "LOCAL_RANK": "0"}
    mark_checked({"NEXTLAT_END_MARK": str(mark)})
    assert mark.read_text() == "checked\n"
    mark_began(environment)
    assert mark.read_text() == "began\n"
    mark_end(75, environment)
    assert mark.read_text() == "75\n"
    for other in ({**environment, "LOCAL_RANK": "1"}, {**environment, "NEXTLAT_LAUNCHER": "ssh"}):
        mark_end(0, other)
    assert mark.read_text() == "75\n", "one rank speaks for a script"
