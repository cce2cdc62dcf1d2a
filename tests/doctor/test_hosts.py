"""The doctor about several hosts: interfaces, a hostfile, ranks under a launcher.

ssh is a stand-in here; tests/launch/test_two_hosts.py has two real hosts. Command: `pytest tests/doctor/test_hosts.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nextlat_dist import cli
from nextlat_dist.doctor import hosts
from nextlat_dist.errors import UserError
from tests.kit.findings import add_command, assert_problem

# Host `good` is this one; `late` has another clock, `bare` sees no file of ours, `dead` does not answer.
SSH = """#!/bin/bash
while [[ "$1" == -* ]]; do shift 2; done
case "$1" in
    dead) echo "ssh: connect to host dead port 22: No route to host" >&2; exit 255 ;;
    late) echo $(($(date +%s) + 100)).5; echo yes; echo yes ;;
    bare) date +%s.%N; echo no; echo no ;;
    *) exec bash -c "$2" ;;
esac
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_command(tmp_path / "bin", "ssh", SSH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two\n\nfirst slots=8\n  second   slots=4  # the smaller one\n")
    assert hosts.read_hostfile(file) == {"first": 8, "second": 4}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("first slots=0", "line 1"),
        ("a slots=1\nb slot=1", "line 2"),
        ("a slots=1\na slots=1", "each host once"),
        ("#", "no host"),
        ("a slots=1\n-oProxyCommand=x slots=1", "line 2"),  # ssh would run it
        ("::1 slots=1", "a host is a name or an IPv4 address"),
        ("a:22 slots=1", "ssh/config"),
        ("node[1-3] slots=1", "a host is a name"),  # several for pdsh
        ("a slots=1x", "line 1"),
        ("a slots=01", "line 1"),
        ("a\x1b[2J slots=1", r"'a\?\[2J slots=1'"),
    ],
)
def test_bad_hostfile(text: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError, match=part):
        hosts.read_hostfile(file)
    with pytest.raises(UserError, match="cannot read the hostfile"):
        hosts.read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    "text",
    [
        "a slots=2\r\n",
        "\ufeffa slots=2\n",
        "a slots=2 max_slots=4\n",
        "a slots=2 # the head\n",
        "\t a \t slots=2",
        "# none\n\na slots=2",
    ],
)
def test_hostfiles_of_other_people(text: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    assert hosts.read_hostfile(file) == {"a": 2}
    file.write_text(text.replace("a ", "me@a.b-c "))
    assert hosts.read_hostfile(file) == {"me@a.b-c": 2}


@pytest.mark.usefixtures("ssh")
def test_names_are_no_shell_text(tmp_path: Path) -> None:
    for name in ("my runs/a", "it's", f"a;touch {tmp_path}/pwned"):
        assert [f.level for f in hosts.check_hosts(["good"], tmp_path / name)] == ["ok"]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.usefixtures("ssh")
def test_a_talkative_login(tmp_path: Path) -> None:
    add_command(tmp_path / "bin", "ssh", SSH.replace("*) exec", "*) echo welcome 1; exec"))
    assert [f.level for f in hosts.check_hosts(["good"], tmp_path)] == ["ok"]
    add_command(tmp_path / "bin", "ssh", "#!/bin/sh\necho no shell here\n")
    assert_problem(hosts.check_hosts(["good"], tmp_path)[0], "no shell here", "login shell")


@pytest.mark.usefixtures("ssh")
def test_hosts_of_a_hostfile(tmp_path: Path) -> None:
    output, began = tmp_path / "runs/a", time.monotonic()
    good, dead, late, python, sharing = hosts.check_hosts(["good", "dead", "late", "bare"], output)
    assert (good.level, good.text) == ("ok", "good answers over ssh")
    assert_problem(dead, "host dead", "No route to host", "leave it out")
    assert_problem(late, "clock of host late", "chrony")
    [seconds] = re.findall(r"by (\d+) seconds", late.text)
    # Its clock is cut to a second; what passes between its answer and our look counts for it.
    assert 99 - (time.monotonic() - began) <= int(seconds) <= 101
    assert_problem(python, "host bare", sys.executable, "same path")
    assert_problem(sharing, "host bare", str(output), "shared file system")
    assert not output.parent.exists(), "what was made for the question goes away"
    assert [f.level for f in hosts.check_hosts(["good"], None)] == ["ok"]
    with pytest.raises(UserError, match="output_dir=/proc/runs/a cannot be written"):
        hosts.check_hosts(["good"], Path("/proc/runs/a"))


def test_a_host_without_ssh_and_pdsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hosts"
    file.write_text("first slots=1\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "tr", "head", "sed", "grep"):  # what reads the hostfile
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["doctor", "--hostfile", str(file)])
    shown = capsys.readouterr().out
    assert re.search("PROBLEM  hosts +ssh is not installed, .*: install openssh-client\n", shown)
    assert re.search("PROBLEM  hosts +pdsh is not installed, .*: install pdsh\n", shown)
    monkeypatch.setenv("PATH", "")
    assert [finding.level for finding in hosts.check_programs()] == ["problem"] * 2
    assert hosts.check_hosts(["first"], tmp_path) == [], "nobody can be asked"
    for name in ("ssh", "pdsh"):
        add_command(programs, name, "#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(programs))
    assert [finding.level for finding in hosts.check_programs()] == ["ok"]


@pytest.mark.parametrize(
    ("environment", "levels"),
    [
        ({}, []),
        ({"GLOO_SOCKET_IFNAME": "lo"}, ["ok"]),
        ({"GLOO_SOCKET_IFNAME": "nothing0"}, ["problem"]),
        ({"GLOO_SOCKET_IFNAME": "lo,nothing0"}, ["problem"]),
        ({"NCCL_SOCKET_IFNAME": "l"}, ["ok"]),  # a prefix
        ({"NCCL_SOCKET_IFNAME": "=lo,nothing"}, ["ok"]),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, ["ok"]),  # all but
        ({"NCCL_SOCKET_IFNAME": "nothing"}, ["problem"]),
    ],
    ids=str,
)
def test_interfaces(environment: dict[str, str], levels: list[str]) -> None:
    findings = hosts.check_interfaces(environment, several_hosts=False)
    assert [finding.level for finding in findings] == levels
    for finding in findings:
        if finding.level == "problem":
            assert "lo" in finding.text.partition("interfaces are")[2]


@pytest.mark.parametrize(("address", "level"), [("127.0.1.1", "problem"), ("10.0.0.7", "ok"), (None, "problem")])
def test_own_name(address: str | None, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo tells other hosts the address of this one's name."""

    def lookup(name: str) -> str:
        if address is None:
            raise OSError
        return address

    monkeypatch.setattr(socket, "gethostbyname", lookup)
    [finding] = hosts.check_interfaces({}, several_hosts=True)
    assert finding.level == level
    assert level == "ok" or "set GLOO_SOCKET_IFNAME" in finding.text
    assert [f.level for f in hosts.check_interfaces({"GLOO_SOCKET_IFNAME": "lo"}, several_hosts=True)] == ["ok"]


MEET = """
import sys
from datetime import timedelta
from pathlib import Path
from nextlat_dist.doctor import hosts
rank, world, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[4])
if rank == 1 and len(sys.argv) > 5:
    import socket, time
    socket.gethostname = lambda: "elsewhere"
    clock = time.time
    time.time = lambda: clock() + 60
    Path.exists = lambda self: False
for finding in hosts.check_ranks(rank, world, Path(sys.argv[3]), timedelta(seconds=seconds)):
    print(finding.level, finding.text)
"""


def meet(ranks: int, world_size: int, output: Path, *arguments: str) -> list[str]:
    """What each rank says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(rank), str(world_size), str(output), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    return [process.communicate(timeout=120)[0] for process in started]


def test_ranks_meet(tmp_path: Path) -> None:
    output = tmp_path / "a"
    zero, one = meet(2, 2, output, "60")
    assert zero == "ok 2 ranks on 1 hosts met, and see the same output_dir\n"
    assert one == ""
    assert not output.exists()


def test_ranks_that_differ(tmp_path: Path) -> None:
    zero, _ = meet(2, 2, tmp_path / "a", "60", "differs")
    assert "problem the clock of host elsewhere differs from the first's by 60 seconds" in zero
    assert "problem host elsewhere does not see this host's files" in zero


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    [zero] = meet(1, 2, tmp_path / "a", "3")
    assert zero.startswith("problem rank 0 does not reach the others through 127.0.0.1:")
