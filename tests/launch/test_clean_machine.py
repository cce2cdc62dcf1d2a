"""The script that makes an empty machine touches nothing of this one: mounts in a namespace, one folder, removed.

debootstrap is a stand-in that makes a folder with what this machine has; the mounts, the clone and the change of root
are real. Command: `pytest tests/launch/test_clean_machine.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kit.launch.checkout import CHECKOUT, Project, assert_one_sentence

# A shell and three tools of this machine stand for a Debian.
DEBOOTSTRAP = """#!/bin/bash
set -e
echo "$*" >"$LOG/arguments"
cd "$4"
mkdir -p proc dev etc root tmp usr/bin usr/lib usr/lib64
ln -s usr/bin usr/lib usr/lib64 .
mknod -m 666 dev/null c 1 3
for name in bash cat env grep; do
    cp -L "$(command -v $name)" usr/bin/
    for library in $(ldd "$(command -v $name)" | grep -o '/[^ ]*'); do
        mkdir -p ".$(dirname "$library")"
        cp -L "$library" ".$library"
    done
done
"""
SETUP = """set -e
cat marker
echo seen >/dev/null
[[ -e /dev/pts/ptmx ]]
grep ' /dev/shm ' /proc/mounts
echo $$ >/dev/shm/number
"""


def can_mount() -> bool:
    probe = ["unshare", "--mount", "--pid", "--fork", "true"]
    return (
        os.geteuid() == 0 and shutil.which("unshare") is not None and subprocess.run(probe, check=False).returncode == 0
    )


@pytest.fixture
def committed(project: Project) -> Project:
    """The launch scripts in a repository of their own, with a set-up that only looks around."""
    (project.root / "launch/setup.sh").write_text(SETUP)
    (project.root / "marker").write_text("of the commit\n")
    (project.root / ".gitignore").write_text("commands/\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "--quiet"], ["add", "-A"], [*identity, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *command], cwd=project.root, check=True)
    (project.root / "marker").write_text("not committed\n")
    project.add_command("debootstrap", DEBOOTSTRAP)
    project.environment["LOG"] = str(project.root / "commands")
    return project


@pytest.mark.skipif(not can_mount(), reason="no privileges to mount")
@pytest.mark.parametrize(("python", "suite"), [("3.13", "trixie"), ("3.11", "bookworm")])
def test_the_commit_runs_there_and_nothing_is_left(committed: Project, python: str, suite: str) -> None:
    mounts, folder = Path("/proc/mounts").read_text(), committed.root / "empty"
    command = ["launch/clean_machine.sh", "--python", python, "--steps", "setup", "--directory", str(folder)]
    result = committed.run(*command)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "of the commit" in result.stdout
    assert "note: changes that are not committed are left out" in result.stdout
    assert suite in (committed.root / "commands/arguments").read_text().split()
    assert not folder.exists()
    assert Path("/proc/mounts").read_text() == mounts


@pytest.mark.skipif(not can_mount(), reason="no privileges to mount")
def test_a_failure_there_is_one_here(committed: Project) -> None:
    folder = committed.root / "empty"
    command = ["launch/clean_machine.sh", "--steps", "quickstart", "--directory", str(folder)]
    result = committed.run(*command)
    assert_one_sentence(result, "bash launch/quickstart.sh failed on the empty machine")
    assert not folder.exists()
    folder.mkdir()
    (folder / "precious").touch()
    assert_one_sentence(committed.run(*command), f"--directory {folder} exists")
    assert (folder / "precious").exists()


def test_no_host_is_named() -> None:
    """The mirror is this machine's own."""
    assert re.search(r"://[A-Za-z0-9]", (CHECKOUT / "launch/clean_machine.sh").read_text()) is None
