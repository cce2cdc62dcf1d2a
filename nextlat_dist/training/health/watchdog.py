"""A stalled or dead rank is named, with every survivor's stacks, and the job ends instead of hanging.

A thread in every rank samples what its main thread does and writes it to `<output_dir>/watchdog/rank_N.json`; nothing
of it is a collective. A rank reads the others' files only when it made no progress itself for nearly
`watchdog.timeout_seconds`, or lost a connection. Whoever finds the culprit writes `verdict.txt`; the others find that,
and all print it and their stacks to stderr and `rank_N.stacks.txt`, and exit with `EXIT_STALLED`.

A rank waits for others when its main thread is in a collective, or, on a GPU, when its device has work that is not
done: a collective is a kernel there, which the host meets wherever it reads a number. A rank whose device is idle and
whose main thread is in no collective keeps the others.

The same samples give each rank's busy time, which shows stragglers. Clocks are never compared between hosts.
Limit: a device that is at work and one that waits in a collective look alike, so that on a GPU only host-side slowness
counts as busy, and of several devices that are not done the one with the least progress is named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist

from nextlat_dist.errors import UserError
from nextlat_dist.training.health.signals import StoppedBySignal

EXIT_STALLED = 76  # a rank stalled or died; the same command resumes from the last checkpoint
DIRECTORY = "watchdog"
VERDICT = "verdict.txt"
SAMPLE_SECONDS = 0.05
COLLECTIVES = "distributed_c10d.py"  # the file whose functions wait for other ranks
NAMED = 8  # ranks in one verdict


@dataclass(frozen=True)
class Beat:
    """What a rank's file says.

    Attributes:
        ticks: grows with every write: the process runs.
        progress: grows with every phase, alike on all ranks: training continues.
        where: innermost line of the main thread outside torch.
        waiting: the main thread is in a collective, or its device has work that is not done.
        ended: the exception that ended training on this rank.
    """

    rank: int
    host: str
    pid: int
    ticks: int = 0
    progress: int = 0
    step: int = 0
    phase: str = "starting"
    where: str = ""
    waiting: bool = False
    ended: str = ""

    def describe(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def last_seen(self) -> str:
        return f"step {self.step}, {self.phase}" + (f", {self.where}" if self.where else "")


class Watchdog:
    """Watches from `__enter__` (collective) to `__exit__`. With a timeout of 0 it does nothing.

    An exception that leaves the block is noted for the other ranks. One that only says that a connection was lost is
    explained by naming the rank at its other end; the process then ends here.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        device_works: Callable[[], bool] = lambda: False,
    ) -> None:
        """`device_works`: whether the device has work of the main thread's that is not done; asked from a thread."""
        self._device_works = device_works
        self._directory = output_dir / DIRECTORY
        self._world_size, self._timeout = world_size, timeout_seconds
        # A stall is suspected early enough to be confirmed within the timeout.
        self._tick_seconds = min(2.0, timeout_seconds / 20)
        self._confirm_seconds = 2.5 * self._tick_seconds
        self._beat = Beat(rank, socket.gethostname(), os.getpid())
        self._place = (0, "starting", 0, time.monotonic())  # step, phase, progress, since when; set by the main thread
        self._main = threading.get_ident()
        self._busy_seconds = 0.0
        self._lost_connection = False
        self._suspicion: tuple[float, int, list[Beat | None]] | None = None  # since when, own progress, all beats
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._timeout:
            if self._beat.rank == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                for path in (*self._directory.glob("rank_*"), self._directory / VERDICT):  # of the run before
                    path.unlink(missing_ok=True)
            dist.barrier()
            self._write()
            dist.barrier()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._timeout:
            return
        if error is not None and lost_connection(error):
            os.write(2, f"rank {self._beat.rank}: {type(error).__name__}: {error}\n".encode())
            self._lost_connection = True
            self._thread.join()  # it ends the process
        self._over.set()
        self._thread.join()
        if error is not None and not isinstance(error, UserError | StoppedBySignal):
            self._beat = replace(self._beat, ended=f"{type(error).__name__}: {error}")
            self._write()

    def beat(self, step: int, phase: str) -> None:
        """Training has come to `phase` of `step`."""
        self._place = (step, phase, self._place[2] + 1, time.monotonic())

    def take_busy_seconds(self) -> float:
        """Time since the last call in which the main thread did not wait in a collective, by samples."""
        busy, self._busy_seconds = self._busy_seconds, 0.0
        return busy

    def _watch(self) -> None:
        sampled = ticked = time.monotonic()
        while not self._over.wait(min(SAMPLE_SECONDS, self._tick_seconds)):
            now = time.monotonic()
            where, waiting = look(sys._current_frames().get(self._main))
            waiting = waiting or self._device_works()
            self._busy_seconds += 0.0 if waiting else now - sampled
            sampled = now
            if now - ticked >= self._tick_seconds:
                ticked = now
                if not self._lost_connection:  # else the main thread waits for this one
                    self._beat = replace(self._beat, where=where, waiting=waiting)
                self._tick(now)

    def _tick(self, now: float) -> None:
        """Write what this rank does; see whether the job must end."""
        self._write()
        found = self._verdict()
        if found:
            self._end(found)
        progress, since = self._place[2:]
        late = self._lost_connection or now - since > self._timeout - self._confirm_seconds - 2 * self._tick_seconds
        if not late:
            self._suspicion = None
        elif self._suspicion is None or self._suspicion[1] != progress:
            self._suspicion = (now, progress, self._read_all())
        elif now - self._suspicion[0] >= self._confirm_seconds:
            self._end(name_culprits(self._suspicion[2], self._read_all()))

    def _write(self) -> None:
        step, phase, progress, _ = self._place
        self._beat = replace(self._beat, ticks=self._beat.ticks + 1, step=step, phase=phase, progress=progress)
        path = self._directory / f"rank_{self._beat.rank}.json"
        try:
            path.with_suffix(".new").write_text(json.dumps(asdict(self._beat)))
            os.replace(path.with_suffix(".new"), path)
        except OSError:  # a full disk is for the next save to tell; a rank without news is named only if training hangs
            pass

    def _read_all(self) -> list[Beat | None]:
        return [self._read(rank) for rank in range(self._world_size)]

    def _read(self, rank: int) -> Beat | None:
        try:
            return Beat(**json.loads((self._directory / f"rank_{rank}.json").read_text()))
        except (OSError, ValueError):
            return None

    def _verdict(self) -> str:
        try:
            return (self._directory / VERDICT).read_text()
        except OSError:
            return ""

    def _end(self, verdict: str) -> None:
        """Say it, show the stacks, leave time for the others to do so too, and end this process."""
        try:
            with (self._directory / VERDICT).open("x") as file:
                file.write(verdict)
        except OSError:  # another rank was first, or nothing can be written
            verdict = self._verdict() or verdict
        os.write(2, f"watchdog of rank {self._beat.rank}: {verdict}\n".encode())
        faulthandler.dump_traceback(2)
        try:
            with (self._directory / f"rank_{self._beat.rank}.stacks.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            pass
        time.sleep(2 * self._tick_seconds)
        os._exit(EXIT_STALLED)  # the main thread may be in a collective that no exception can reach


def look(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost line outside torch, whether the innermost call of all waits in a collective)."""
    waiting = frame is not None and frame.f_code.co_filename.endswith(COLLECTIVES)
    while frame is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "", waiting
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}", waiting


def lost_connection(error: BaseException) -> bool:
    """Whether an exception only says that some other rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def name_culprits(before: Sequence[Beat | None], after: Sequence[Beat | None]) -> str:
    """One sentence about the ranks that keep the others, from two looks at every rank's file."""
    failed = [beat for beat in after if beat is not None and beat.ended]
    if failed:
        return "; ".join(f"{beat.describe()} ended with {beat.ended} in {beat.last_seen()}" for beat in failed[:NAMED])
    silent = [
        beat.describe() + f" does not answer since {beat.last_seen()}"
        if beat is not None
        else f"rank {rank} is unknown"
        for rank, (first, beat) in enumerate(zip(before, after, strict=True))
        if beat is None or (first is not None and first.ticks == beat.ticks)
    ]
    if silent:
        return "; ".join(silent[:NAMED]) + ": stopped, killed, or its host is gone"
    beats = [beat for beat in after if beat is not None]
    stalled = [beat for beat in beats if not beat.waiting] or beats
    least = min(beat.progress for beat in stalled)
    named = [beat for beat in stalled if beat.progress == least]
    return "; ".join(f"{beat.describe()} makes no progress in {beat.last_seen()}" for beat in named[:NAMED])


def slowest(busy_seconds: Sequence[float]) -> tuple[int, float] | None:
    """(the rank that was busy longest, its ratio to the lower median).

    None for a rank alone, and where nothing was sampled.
    """
    median = sorted(busy_seconds)[(len(busy_seconds) - 1) // 2]
    if median <= 0 or len(busy_seconds) == 1:
        return None
    rank = max(range(len(busy_seconds)), key=busy_seconds.__getitem__)
    return rank, busy_seconds[rank] / median
