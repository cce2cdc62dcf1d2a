"""Seeded random input, and a judge of how it was answered.

    sandbox = Sandbox(tmp_path)                       cwd, home, temporary folder and cache of every case
    found = Findings(budget_seconds=180)
    for number in cases(2000):
        random = generator("config", number)          the same on every machine
        ...write below sandbox.cwd what the case needs...
        before = sandbox.files()
        answer = sandbox.run(partial(main, ["train", ...]), writable=[sandbox.cwd / "out"])
        found.judge(f"config {number}: …", answer, sandbox.changed(before, [sandbox.cwd / "out"]))
    found.check()                                     raises with every finding

A case is a function that returns an exit status or None, as `main` does. It runs in a fork of this process, which has
the heavy imports done (`warm`); so nothing it changes stays, and its status, output, memory and time are a real
process's. Right is: a status of the known ones, no text of a traceback, a message that is short and has no control
characters, an end in time, memory within the bound, and nothing written outside `writable`.

FUZZ_SEED=7 draws other cases; FUZZ_CASES=config:17 (kind:number) runs that one alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# 0 done; 1 something was found (verify, doctor); 2 a user's mistake; 75 stopped and saved; 76 a stalled rank
STATUSES = (0, 1, 2, 75, 76)
LONGEST_MESSAGE = 4000  # characters on stderr of a refused command, usage line included
CPU_SECONDS = 90  # more than any case needs; a loop without end is stopped by it even on a busy machine
MEMORY_BYTES = 3 << 30  # more than this process has, for a case
ALWAYS_WRITABLE = ("/dev/null", "/dev/tty", "/dev/shm", "/dev/stdout", "/dev/stderr", "/proc/self")
TRACES = ("Traceback (most recent call last)", 'File "', "AssertionError", "RecursionError", "MemoryError")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def generator(kind: str, number: int) -> random.Random:
    """Draws of one case."""
    return random.Random(f"{os.environ.get('FUZZ_SEED', '0')}-{kind}-{number}")


def cases(kind: str, count: int) -> Iterable[int]:
    """Numbers of the cases of a kind: all, or the one that FUZZ_CASES names."""
    wanted, _, number = os.environ.get("FUZZ_CASES", "").partition(":")
    if not wanted:
        return range(count)
    return [int(number)] if wanted == kind else []


def warm(*modules: str) -> None:
    """Import what the cases would, once and before they fork."""
    for module in modules:
        importlib.import_module(module)


@dataclass(frozen=True)
class Answer:
    """How a case ended. `status` is None for one that did not end in time, negative for a signal."""

    status: int | None
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    memory_bytes: int
    written: tuple[str, ...]  # paths outside what it may write, as Python opened them


@dataclass
class Sandbox:
    """A folder for cases: `cwd` is theirs, `home` holds their home, temporary files and cache."""

    root: Path
    cwd: Path = field(init=False)
    home: Path = field(init=False)

    def __post_init__(self) -> None:
        self.cwd, self.home = self.root / "cwd", self.root / "home"
        for folder in (self.cwd, self.home / "tmp", self.home / "cache"):
            folder.mkdir(parents=True, exist_ok=True)

    def files(self) -> dict[str, tuple[int, int, int]]:
        """Every path below `cwd` with its mode, size and time of change."""
        found = {}
        for folder, folders, names in os.walk(self.cwd):
            for name in (*folders, *names):
                path = os.path.join(folder, name)
                status = os.lstat(path)
                is_folder = os.path.isdir(path) and not os.path.islink(path)
                found[path] = (
                    (status.st_mode, 0, 0) if is_folder else (status.st_mode, status.st_size, status.st_mtime_ns)
                )
        return found

    def changed(self, before: dict[str, tuple[int, int, int]], writable: Iterable[Path] = ()) -> list[str]:
        """Paths below `cwd` that came, went or changed since `before`, outside `writable`."""
        after, allowed = self.files(), tuple(map(str, writable))
        return sorted(
            path
            for path in before.keys() | after.keys()
            if before.get(path) != after.get(path) and not _inside(path, allowed)
        )

    def run(
        self,
        case: Callable[[], Any],
        *,
        writable: Sequence[Path] = (),
        stdin: bytes = b"",
        timeout: float = 300,
        environment: dict[str, str] | None = None,
    ) -> Answer:
        """The answer of `case` in a process of its own, in `cwd`."""
        out, err, log, given = (self.root / name for name in ("stdout", "stderr", "written", "stdin"))
        given.write_bytes(stdin)
        for path in (out, err, log):
            path.write_bytes(b"")
        started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            try:
                self._become(given, out, err, environment or {})
                _note_writes(log, (str(self.home), *map(str, writable), *ALWAYS_WRITABLE))
                status = _status_of(case)
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
            except BaseException:  # the frame's own fault: never back into pytest
                traceback.print_exc()
                status = 99
            os._exit(status)
        ended, usage = _wait(child, timeout)
        texts = [path.read_text(encoding="utf-8", errors="backslashreplace") for path in (out, err, log)]
        return Answer(
            ended,
            texts[0],
            texts[1],
            time.monotonic() - started,
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss * 1024,
            tuple(sorted(set(texts[2].splitlines()))),
        )

    def _become(self, stdin: Path, out: Path, err: Path, environment: dict[str, str]) -> None:
        os.setsid()
        for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1):  # pytest's timeout; what a command handles
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, path, flags in ((0, stdin, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
            descriptor = os.open(path, flags)
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
        os.chdir(self.cwd)
        folders = {"HOME": self.home, "TMPDIR": self.home / "tmp", "NEXTLAT_CACHE": self.home / "cache"}
        folders["TORCHINDUCTOR_CACHE_DIR"] = self.home / "cache"
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
        os.environ.update({name: str(path) for name, path in folders.items()} | environment)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, resource.RLIM_INFINITY))


def _status_of(case: Callable[[], Any]) -> int:
    """As the interpreter does it: an exception that nobody catches prints its traceback and is status 1."""
    try:
        return int(case() or 0)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(ended.code + "\n")
            return 1
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1


def _wait(child: int, timeout: float) -> tuple[int | None, resource.struct_rusage]:
    """Exit status and use of a child, killed with its group after `timeout` seconds."""
    end, in_time = time.monotonic() + timeout, True
    pause = 0.001
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return (code if in_time else None), usage
        if in_time and time.monotonic() > end:
            in_time = False
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def _inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _note_writes(log: Path, allowed: tuple[str, ...]) -> None:
    """Append to `log` every path outside `allowed` that Python opens for writing, makes, renames or removes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    real = tuple(os.path.realpath(folder) for folder in allowed)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        for path in _paths_written(event, arguments):
            if isinstance(path, int):
                continue
            text = os.path.abspath(os.fsdecode(path))
            if not _inside(text, allowed) and not _inside(os.path.realpath(text), real):
                os.write(descriptor, f"{event} {text!r}\n".encode(errors="backslashreplace"))

    sys.addaudithook(note)


def _paths_written(event: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING and path is not None:
            yield path
    elif event == "os.mkdir":
        if not os.path.lexists(arguments[0]):  # else it fails
            yield arguments[0]
    elif event in ("os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree"):
        yield arguments[0]
    elif event in ("os.rename", "shutil.move"):
        yield from arguments[:2]
    elif event in ("os.link", "os.symlink"):
        yield arguments[1]


@dataclass
class Findings:
    """What was answered wrongly, and how the time went."""

    budget_seconds: float
    statuses: tuple[int, ...] = STATUSES
    wrong: list[str] = field(default_factory=list)
    counts: dict[int | None, int] = field(default_factory=dict)
    seconds: float = 0.0
    longest: tuple[float, str] = (0.0, "")

    def judge(self, case: str, answer: Answer, changed: Sequence[str] = ()) -> None:
        """Note what is wrong with an answer; `changed` are paths that the case should have left alone."""
        self.counts[answer.status] = self.counts.get(answer.status, 0) + 1
        self.seconds += answer.cpu_seconds  # another process may have the machine
        self.longest = max(self.longest, (answer.cpu_seconds, case))
        faults = list(faults_of(answer, self.statuses))
        faults += [f"changed {path}" for path in changed]
        if faults:
            last = answer.err.strip().splitlines()[-1:] or [""]
            self.wrong.append(f"{case}\n    {'; '.join(faults)[:600]}\n    {last[0][:300]}")

    def check(self) -> None:
        """Raises AssertionError with the findings."""
        shown = "\n".join(self.wrong[:40])
        assert not self.wrong, f"{len(self.wrong)} of {sum(self.counts.values())} answered wrongly\n{shown}"
        assert self.seconds <= self.budget_seconds, f"{self.seconds:.0f} s; the longest took {self.longest}"


def faults_of(answer: Answer, statuses: Sequence[int] = STATUSES) -> Iterator[str]:
    """What is wrong with an answer."""
    both = answer.out + answer.err
    if answer.status is None:
        yield f"did not end within {answer.seconds:.0f} s"
    elif answer.status not in statuses:
        yield f"exit status {answer.status}"
    yield from (f"the text of a traceback ({trace})" for trace in TRACES[:1] if trace in both)
    if answer.status == 2:
        yield from (f"{trace!r} in the message" for trace in TRACES[1:] if trace in answer.err)
        if "error: " not in answer.err:
            yield "no sentence beginning with error:"
        if len(answer.err) > LONGEST_MESSAGE:
            yield f"a message of {len(answer.err):,} characters"
    if _CONTROL.search(answer.err.replace("\r", "")):
        yield "control characters on stderr"
    yield from (f"wrote outside: {path}" for path in answer.written)
