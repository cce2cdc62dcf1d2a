"""Processes are found by parent and by command line without procps, whatever their names hold.

Command: `pytest tests/launch/test_processes.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.launch.checkout import CHECKOUT

# A name with a bracket and blanks: fields of /proc/PID/stat are counted after it.
CHILD = (
    "import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'a) 1 (b', 0, 0, 0); os.write(1, b'1\\n'); time.sleep(60)"
)
PARENT = (
    "import subprocess, sys\n"
    "children = [subprocess.Popen([sys.executable, '-c', sys.argv[1], 'marked-child']) for _ in range(2)]\n"
    "sys.exit(max(child.wait() < 0 for child in children))"
)


def shell(text: str) -> subprocess.CompletedProcess[str]:
    script = f'set -uo pipefail; source "{CHECKOUT}/launch/processes.sh"; {text}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["1\n"] * 2
    yield process
    for child in shell(f"children_of {process.pid}").stdout.split():
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=30)


def test_children_of_a_process(parent: subprocess.Popen[str]) -> None:
    children = shell(f"children_of {parent.pid}").stdout.split()
    assert len(children) == 2
    assert all(Path(f"/proc/{child}/comm").read_text() == "a) 1 (b\n" for child in children)
    assert children[0] in shell(f"children_of 999999999 {parent.pid}").stdout.split()
    result = shell(f"children_of {children[0]}")
    assert (result.returncode, result.stdout) == (1, "")


def test_processes_by_command_line(parent: subprocess.Popen[str]) -> None:
    children = shell(f"children_of {parent.pid}").stdout.split()
    found = shell(f"processes_like '^{sys.executable} -c import ctypes.* marked-child $'").stdout.split()
    assert set(children) <= set(found)
    assert str(parent.pid) not in found
    assert shell("processes_like '^nothing of this kind '").returncode == 1


def test_signals_go_to_the_children_only(parent: subprocess.Popen[str]) -> None:
    assert shell(f"signal_children TERM {parent.pid}").returncode == 0
    assert parent.wait(timeout=30) == 1, "its children ended by a signal, itself did not"
    assert shell(f"signal_children TERM {parent.pid}").returncode != 0
