"""One run per output_dir: a file in it names the run that writes there, and a second run is refused.

    lock = take_lock(output_dir)        rank 0 of a run; `lock.release()` at its end

The file says which process holds the lock (host, id, time of its start) and is written again every `BEAT_SECONDS`.
A dead owner's lock is taken over: at once where this machine sees that the process is gone, or where both were started
by the same launch script, which ends its ranks before it starts others; of another host (or container) when it gave no
sign of life for `STALE_SECONDS`. Clocks of hosts are never compared, only the file system's with itself.

Invariant: a run that lost its lock ends before it writes anything more than the step under way; the file lies next to
the checkpoints, never in one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.files import RUN_LOCK_FILE, opened_folder, write_whole

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # twelve beats: a slow file system must not look like a dead host
LAUNCH = "NEXTLAT_LAUNCH"  # names what started the ranks, and starts them again: a launch script, a Slurm job
EXIT_LOST = 76  # as for a stalled rank: the run is not this process's any more


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        machine: of the process's id: the same id elsewhere, or in another container, is another process.
        started: of the process, in the kernel's own ticks since boot.
        since: for people.
        launch: see `LAUNCH`; empty without a launch script.
        token: of this lock alone.
        beats: grows as long as the run lives.
    """

    host: str
    pid: int
    machine: str
    started: int
    since: str
    launch: str
    token: str
    beats: int = 0

    def describe(self) -> str:
        return f"the run on host {self.host}, pid {self.pid}, since {self.since}"


class RunLock:
    """A lock that this process holds; a thread shows that it lives."""

    def __init__(self, output_dir: Path, owner: Owner, lost: Callable[[str], None], beat_seconds: float) -> None:
        self._directory, self._owner, self._lost = output_dir, owner, lost
        self._beat_seconds = beat_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError), _turn(self._directory):
            found = _parsed(_read(self._directory)[0])
            if found is not None and found.token == self._owner.token:
                (self._directory / RUN_LOCK_FILE).unlink()

    def _beat(self) -> None:
        while not self._over.wait(self._beat_seconds):
            try:
                with _turn(self._directory):
                    found = _parsed(_read(self._directory)[0])
                    if found is None or found.token == self._owner.token:
                        self._owner = replace(self._owner, beats=self._owner.beats + 1)
                        _write(self._directory, self._owner)
                        continue
            except OSError:  # a full disk is for the next save to tell
                continue
            self._lost(
                f"{found.describe()} has taken output_dir={self._directory}, to which this one (pid {os.getpid()}) had "
                "shown no sign of life: this one ends"
            )
            return


def take_lock(
    output_dir: Path,
    *,
    lost: Callable[[str], None] | None = None,
    waiting: Callable[[str], None] = lambda text: None,
    beat_seconds: float = BEAT_SECONDS,
    stale_seconds: float = STALE_SECONDS,
) -> RunLock:
    """The lock of `output_dir`, which exists. Where only a heartbeat can tell, waits until it has.

    Args:
        lost: called by the thread when another run has taken over; None: ends the process.
        waiting: told what is waited for.

    Raises:
        UserError: a run holds it; the message names it.
        OSError: the file cannot be read or written.
    """
    mine = _myself()
    seen, deadline = "", 0.0  # what another machine's run wrote, and when it counts as dead
    while True:
        with _turn(output_dir):
            text, age = _read(output_dir)
            owner = _parsed(text)
            verdict = _lives(owner, mine.launch) if text else False
            if verdict is None and seen and text != seen:
                verdict = True
            now = time.monotonic()
            if verdict is None and not seen:
                # Two beats even of an old file: this machine, or its clock, may just have been asleep.
                wait = max(2 * beat_seconds, stale_seconds - age)
                seen, deadline = text, now + wait
                who = owner.describe() if owner is not None else f"a {RUN_LOCK_FILE} that cannot be read"
                waiting(f"output_dir={output_dir} has {who}: it counts as dead without a sign of life for {wait:.0f} s")
            if verdict:
                assert owner is not None
                raise UserError(_refusal(output_dir, owner))
            if verdict is False or now >= deadline:
                _write(output_dir, mine)
                return RunLock(output_dir, mine, lost or _end, beat_seconds)
        time.sleep(min(0.5, beat_seconds / 4))


@dataclass(frozen=True)
class Use:
    """Whose an output_dir is.

    Attributes:
        text: names the run.
        certain: that it lives; if not, a run that starts now waits until a heartbeat, or none, has told.
    """

    text: str
    certain: bool


def in_use(output_dir: Path, stale_seconds: float = STALE_SECONDS) -> Use | None:
    """The run that holds `output_dir`; None where there is none, or a dead one. Waits for nothing."""
    try:
        text, age = _read(output_dir)
    except OSError:
        return None
    owner = _parsed(text)
    if owner is None:
        return None
    lives = _lives(owner, os.environ.get(LAUNCH, ""))
    if lives:
        return Use(_refusal(output_dir, owner), certain=True)
    if lives is None and age < stale_seconds:
        sign = f"its last sign of life is {age:.0f} s old; it counts as dead after {stale_seconds:.0f} s"
        return Use(f"{_refusal(output_dir, owner)} ({sign})", certain=False)
    return None


def process_started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since boot; None where there is none, or only its remains.

    The id and this number together are one process: ids are used again.
    """
    fields = process_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def process_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on: state, parent, group, session, …; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(") ")[2].split()


def _refusal(output_dir: Path, owner: Owner) -> str:
    return (
        f"output_dir={output_dir} is in use by {owner.describe()}; wait for it or stop it, or choose another output_dir"
    )


def _lives(owner: Owner | None, launch: str) -> bool | None:
    """Whether the run lives; None where only its heartbeat can tell."""
    if owner is None:
        return None
    if owner.machine == _machine():
        return process_started(owner.pid) == owner.started
    return False if launch and owner.launch == launch else None


def _myself() -> Owner:
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=process_started(os.getpid()) or 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        launch=os.environ.get(LAUNCH, ""),
        token=secrets.token_hex(16),
    )


def _machine() -> str:
    """Where process ids mean the same; of a machine without /proc, nothing that another could be equal to."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(16)


def _read(output_dir: Path) -> tuple[str, float]:
    """(content of the lock, its age by the file system's clock); ("", 0) where there is none."""
    try:
        with (output_dir / RUN_LOCK_FILE).open(errors="replace") as file:
            text, written = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return "", 0.0
    try:
        with tempfile.TemporaryFile(dir=output_dir) as probe:
            probe.write(b"\0")
            probe.flush()
            return text, max(0.0, os.fstat(probe.fileno()).st_mtime - written)
    except OSError:  # read-only, full: as if it were new
        return text, 0.0


def _write(output_dir: Path, owner: Owner) -> None:
    write_whole(output_dir / RUN_LOCK_FILE, json.dumps(asdict(owner)) + "\n", durable=False)


def _parsed(text: str) -> Owner | None:
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    return owner if {name: type(value) for name, value in asdict(owner).items()} == _TYPES else None


_TYPES = {
    **dict.fromkeys(("host", "machine", "since", "launch", "token"), str),
    **dict.fromkeys(("pid", "started", "beats"), int),
}


@contextlib.contextmanager
def _turn(output_dir: Path) -> Iterator[None]:
    """No two processes read and write the lock at one time, where the file system has locks."""
    with opened_folder(output_dir) as descriptor:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _end(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"error: {text}\n".encode())
    os._exit(EXIT_LOST)  # the main thread may be in a collective that no exception can reach
