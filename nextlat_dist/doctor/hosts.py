"""Network interfaces, the hosts of a hostfile, and what the ranks under a launcher see of one another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from nextlat_dist.config.shipped import shipped_root
from nextlat_dist.doctor.findings import Finding, ok, problem
from nextlat_dist.errors import UserError

CLOCK_SECONDS = 5.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
PROGRAMS = {"ssh": "openssh-client", "pdsh": "pdsh"}  # and the package of each
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host, in order.

    Raises:
        UserError: it cannot be read, or a line is not `HOST slots=N`.
    """
    parser = shipped_root() / "launch/hostfile.sh"  # the launch script's own: two would have two opinions
    parsed = subprocess.run(["bash", str(parser), str(path)], capture_output=True, text=True, check=False)
    if parsed.returncode != 0:
        raise UserError(parsed.stderr.strip().removeprefix("error: "))
    lines = (line.split(" slots=") for line in parsed.stdout.splitlines())
    return {host: int(slots) for host, slots in lines}


def check_interfaces(environment: Mapping[str, str], several_hosts: bool) -> list[Finding]:
    """The interfaces that the environment names exist; without a name, the host's own name must not be its loopback."""
    mine = [name for _, name in socket.if_nameindex()]
    findings = []
    for variable in INTERFACES:
        value = environment.get(variable, "")
        # NCCL takes prefixes and exclusions, gloo a list of names.
        exact = [name for name in value.split(",") if name] if variable.startswith("GLOO") else []
        missing = [name for name in exact if name not in mine]
        if variable.startswith("NCCL") and value and not value.startswith("^"):
            prefixes = value.removeprefix("=").split(",")
            missing = [] if any(name.startswith(prefix) for prefix in prefixes for name in mine) else prefixes
        if missing:
            findings.append(
                problem(
                    "interface",
                    f"{variable}={value}, but this host's interfaces are {', '.join(mine)}: name one of them",
                )
            )
        elif value:
            findings.append(ok("interface", f"{variable}={value}"))
    if several_hosts and not any(environment.get(variable) for variable in INTERFACES):
        findings.append(_check_host_name(mine))
    return findings


def _check_host_name(interfaces: Sequence[str]) -> Finding:
    name = socket.gethostname()
    advice = f"set GLOO_SOCKET_IFNAME to the interface between the hosts ({', '.join(interfaces)})"
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return problem("interface", f"this host's name {name} resolves to no address: {advice}")
    if address.startswith("127."):
        return problem(
            "interface", f"this host's name {name} resolves to {address}, which other hosts cannot reach: {advice}"
        )
    return ok("interface", f"{name} is {address}")


def check_programs() -> list[Finding]:
    """What launch/multi_node.sh reaches the hosts of a hostfile with."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    texts = [f"{name} is not installed, and hosts are reached with it: install {PROGRAMS[name]}" for name in missing]
    return [problem("hosts", text) for text in texts] or [ok("hosts", f"{' and '.join(PROGRAMS)} are installed")]


def check_hosts(hosts: Sequence[str], output_dir: Path | None) -> list[Finding]:
    """Ask every host over ssh, all at once: its clock, this project's Python, and whether it sees our `output_dir`.

    Without ssh nothing can be asked, which `check_programs` says.
    """
    if shutil.which(SSH[0]) is None:
        return []
    with contextlib.ExitStack() as stack:
        token = None if output_dir is None else stack.enter_context(_token(output_dir))
        with ThreadPoolExecutor(max_workers=32) as pool:
            return [f for found in pool.map(lambda host: _check_host(host, token), hosts) for f in found]


def _check_host(host: str, token: Path | None) -> list[Finding]:
    script = f"date +%s.%N; test -x {shlex.quote(sys.executable)} && echo yes || echo no"
    if token is not None:
        script += f"; test -e {shlex.quote(str(token))} && echo yes || echo no"
    before = time.time()
    result = subprocess.run([*SSH, host, script], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    after = time.time()
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"ssh ended with {result.returncode}"])[-1]
        return [problem("hosts", f"host {host} does not answer over ssh: {reason}; repair that or leave it out")]
    # Its start-up files may print something before.
    answer = re.search(r"^(\d+)[.]?(\d*)\S*\n(yes|no)\n?(yes|no)?\n?\Z", result.stdout, re.MULTILINE | re.ASCII)
    if answer is None:
        said = ascii(result.stdout[-100:])
        return [problem("hosts", f"host {host} answers {said} over ssh: its login shell must run sh's commands")]
    clock, python, shared = f"{answer[1]}.{answer[2] or 0}", answer[3], answer[4]
    findings = []
    # The answer was made at some moment between the two readings of our own clock.
    difference = max(before - float(clock), float(clock) - after, 0.0)
    if difference > CLOCK_SECONDS:
        text = (
            f"the clock of host {host} differs from this one's by {difference:.0f} seconds: run a time service (chrony)"
        )
        findings.append(problem("clock", text))
    if python != "yes":
        text = f"host {host} has no {sys.executable}: it needs this project, set up, at the same path"
        findings.append(problem("hosts", text))
    if shared == "no":
        assert token is not None
        findings.append(_sharing_problem(host, token))
    return findings or [ok("hosts", f"{host} answers over ssh")]


def _clock_problem(host: str, seconds: float) -> Finding:
    text = f"the clock of host {host} differs from the first's by {seconds:.0f} seconds: run a time service (chrony)"
    return problem("clock", text)


def _sharing_problem(host: str, token: Path) -> Finding:
    text = f"host {host} does not see this host's files in output_dir={token.parent}: put it on a shared file system"
    return problem("output_dir", text)


@contextlib.contextmanager
def _token(directory: Path) -> Iterator[Path]:
    """A file in `directory` that nothing else has made; directories made for it go away with it."""
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    token = directory.absolute() / f".doctor-{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UserError(f"output_dir={directory} cannot be written: {error.strerror}; change output_dir") from None
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def check_ranks(rank: int, world_size: int, output_dir: Path | None, timeout: timedelta) -> list[Finding]:
    """Under a launcher: the ranks meet, compare clocks and look for rank 0's file. Collective over all ranks.

    Returns:
        On rank 0 what is wrong anywhere, elsewhere nothing.
    """
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, world_size, is_master=rank == 0 and not _agent_serves(), timeout=timeout)
        with contextlib.ExitStack() as stack:
            if rank == 0:
                token = None if output_dir is None else stack.enter_context(_token(output_dir))
                store.set("doctor/token", str(token or ""))
            path = store.get("doctor/token").decode()
            before = time.time()
            store.set(f"doctor/asked/{rank}", "")
            zero = float(store.get(f"doctor/clock/{rank}")) if rank else time.time()
            seen = {
                "host": socket.gethostname(),
                "clock": max(before - zero, zero - time.time(), 0.0),
                "shared": not path or Path(path).exists(),
            }
            store.set(f"doctor/seen/{rank}", json.dumps(seen))
            if rank:
                store.get("doctor/end")
                return []
            for other in range(1, world_size):
                store.get(f"doctor/asked/{other}")
                store.set(f"doctor/clock/{other}", str(time.time()))
            everything = [json.loads(store.get(f"doctor/seen/{other}")) for other in range(world_size)]
            store.set("doctor/end", "")
            time.sleep(0.5)  # the store lives in this process
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        return [problem("ranks", f"rank {rank} does not reach the others through {address}:{port}: {text}")]
    return _compare(everything, path)


def _agent_serves() -> bool:
    """torchrun's own process keeps the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _compare(everything: Sequence[Mapping[str, object]], path: str) -> list[Finding]:
    findings: list[Finding] = []
    by_host = {str(seen["host"]): seen for seen in everything}
    for host, seen in by_host.items():
        difference = float(str(seen["clock"]))
        if difference > CLOCK_SECONDS:
            findings.append(_clock_problem(host, difference))
        if not seen["shared"]:
            findings.append(_sharing_problem(host, Path(path)))
    return findings or [
        ok("ranks", f"{len(everything)} ranks on {len(by_host)} hosts met, and see the same output_dir")
    ]
