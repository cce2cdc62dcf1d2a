"""Real ranks for tests: N processes with gloo, kept alive between tests, because importing the stack takes seconds.

    ranks.run(job, argument, …)   calls job(argument, …) on every rank and returns the list of results

A job that does not finish in time has its stacks printed and its processes killed; the next `run` starts fresh ones.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
GRACE_SECONDS = 3.0
# Under ZeRO-3, DeepSpeed's engine is never freed, and with it its process groups, whose gloo threads wake a hundred
# times a second; after this many jobs start afresh.
JOBS_PER_START = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _context() -> Any:
    """Its processes are forked from a server that imported the stack once, for all pools of all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kit.stack"])
    return context


class Ranks:
    """A pool of `size` rank processes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._jobs = 0
        self._logs = Path(tempfile.mkdtemp(prefix=f"ranks{size}_"))

    def run(self, job: Callable[..., Any], *arguments: Any, timeout: float = 150.0) -> list[Any]:
        """Results of `job(*arguments)` by rank. An exception on any rank fails the test with its traceback."""
        if self._jobs == JOBS_PER_START:
            self.stop()
        if not self._processes:
            self._start()
        self._jobs += 1
        for pipe in self._pipes:
            pipe.send((job, arguments))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.size and (left := deadline - time.monotonic()) > 0:
            waiting = {id(pipe): rank for rank, pipe in enumerate(self._pipes) if rank not in results}
            for pipe in wait([self._pipes[rank] for rank in waiting.values()], timeout=left):
                rank = waiting[id(pipe)]
                try:
                    results[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = (False, f"died\n{self._log(rank)}")
            if any(not ok for ok, _ in results.values()):
                # The others may wait for the failed rank in a collective.
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        missing = [rank for rank in range(self.size) if rank not in results]
        stacks = self._stacks() if missing else ""
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(results.items()) if not ok]
        if missing:
            failures.append(f"ranks {missing} of {self.size} gave no answer in {timeout:.0f} s\n{stacks}")
        if failures:
            self.stop()  # ranks may have left a collective half-way
            raise AssertionError("\n".join(failures))
        return [results[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes, self._jobs = [], [], 0

    def _start(self) -> None:
        context = _context()
        port = free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, port, theirs, str(self._logs / f"rank{rank}.log")), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(START_SECONDS):
                log = self._log(rank)
                self.stop()
                raise AssertionError(f"rank {rank} of {self.size} did not start\n{log}")
            assert pipe.recv() == "ready"

    def _stacks(self) -> str:
        for process in self._processes:
            os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1.0)
        return "\n".join(f"--- rank {rank}\n{self._log(rank)}" for rank in range(self.size))

    def _log(self, rank: int) -> str:
        path = self._logs / f"rank{rank}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-60:]) if path.exists() else ""


def _serve(rank: int, size: int, port: int, pipe: Connection, log: str) -> None:
    import faulthandler
    import sys

    stream = open(log, "w", buffering=1)  # noqa: SIM115 - open as long as the process lives
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    import torch

    from nextlat_dist.parallel.dims import initialize_distributed

    torch.set_num_threads(1)
    initialize_distributed()
    pipe.send("ready")
    while True:
        try:
            job, arguments = pipe.recv()
        except EOFError:
            sys.exit(0)
        try:
            answer: tuple[bool, Any] = (True, job(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
