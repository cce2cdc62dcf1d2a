"""Child processes of a grid: how many threads they get, how they are stopped, and that no two grids share a directory.

Invariant: the lock is held as long as the grid or any process that it started lives, even when the grid itself was
killed; so a second grid never writes next to what a first one left running.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from nextlat_dist.errors import UserError

WATCH_SECONDS = 20.0


class Processes:
    """Starts processes until it is told to stop; `run` may be called from several threads."""

    def __init__(self, lock: int, jobs: int, environment: Mapping[str, str] | None = None) -> None:
        """
        Args:
            lock: descriptor that children inherit.
            jobs: how many share this machine's cores.
            environment: variables of theirs, over our own.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ, **(environment or {})}
        self._lock_descriptor = lock
        self._guard = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(
        self,
        command: Sequence[str],
        log: IO[bytes],
        stdout: IO[bytes] | None = None,
        watch: Callable[[], None] = lambda: None,
    ) -> int:
        """Exit status of `command`, negative when a signal ended it.

        Args:
            log: gets its stderr, and its stdout too where `stdout` is None.
            watch: called every `WATCH_SECONDS` while it runs.
        """
        with self._guard:
            if self._stopped:
                return -1
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=self._environment,
                pass_fds=(self._lock_descriptor,),
                start_new_session=True,  # Ctrl-C is ours to pass on: a training then saves before it ends
            )
            self._running.add(process)
        while True:
            try:
                status = process.wait(WATCH_SECONDS)
                break
            except subprocess.TimeoutExpired:
                watch()
        with self._guard:
            self._running.discard(process)
        return status

    def stop(self) -> None:
        """Ask every running process to end, and start no other."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                process.terminate()


@contextlib.contextmanager
def locked(output: Path) -> Iterator[int]:
    """Hold `output`/lock; gives its descriptor. Raises UserError when another holds it."""
    with (output / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another grid, or a process that it left running, works in {output}; let it end or name another "
                "--output"
            ) from None
        yield file.fileno()
