"""Ranks that the launch scripts started, and hosts that are this machine."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.kit.launch.checkout import Project

# ssh -o OPTION … HOST COMMAND…: every host is this one, but those in the file `down` do not answer.
SSH = """#!/bin/bash
while [[ "$1" == -o ]]; do shift 2; done
if grep -qx "$1" down 2>/dev/null; then
    echo "ssh: connect to host $1 port 22: No route to host" >&2
    exit 255
fi
echo 127.0.0.1 somewhere-else
"""


# pdsh -S -f N -w HOST,HOST COMMAND…: runs the command per host with %n replaced by the host's number.
PDSH = """#!/bin/bash
hosts="$5"; shift 5
echo "$hosts $*" >>pdsh.log
number=0; status=0; pids=()
for host in ${hosts//,/ }; do
    env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "${*//%n/$number}" & pids+=($!)
    number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


def reports(project: Project, ranks: int) -> list[dict[str, Any]]:
    files = sorted(project.root.glob("report.*"))
    assert [file.name for file in files] == [f"report.{rank}" for rank in range(ranks)]
    return [json.loads(file.read_text()) for file in files]


def stopped(project: Project) -> dict[str, str]:
    """The signal that each rank was asked to stop with."""
    return {path.name: path.read_text() for path in project.root.glob("stopped.*")}


def starts(project: Project, rank: int = 0) -> list[str]:
    """The number of ranks at each start."""
    return (project.root / f"starts.{rank}").read_text().split()


def wait_for(paths: list[Path], process: subprocess.Popen[str]) -> None:
    while not all(path.exists() for path in paths):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def add_hosts(project: Project, *hosts: str) -> None:
    """Stand-ins for ssh, which does not reach the hosts listed in the file `down`, and pdsh; and a hostfile."""
    project.add_command("ssh", SSH)
    project.add_command("pdsh", PDSH)
    (project.root / "hosts").write_text("# all of them\n" + "".join(f"{host}  slots=1\n" for host in hosts))
