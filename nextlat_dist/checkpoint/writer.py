"""Saving during training: the state is copied to host memory, then written and committed by a background thread.

Invariant: at most one save is under way; what it writes was copied before training went on; a save that fails leaves
older checkpoints as they were and says so at the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nextlat_dist.checkpoint.commit import commit, prune
from nextlat_dist.checkpoint.tensors import Fragment, write_fragments
from nextlat_dist.errors import UserError
from nextlat_dist.parallel.host_exchange import HostExchange
from nextlat_dist.reporting.log import logger

log = logger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Everything that this rank adds to a checkpoint, in host memory.

    Attributes:
        name: of this rank's files, "tp0_pp0_dp0".
        fragments: of weights and optimizer state.
        files: {relative name: content} of everything else.
    """

    name: str
    fragments: Sequence[Fragment]
    files: dict[str, bytes]

    def write(self, directory: Path) -> list[str]:
        names = write_fragments(directory, self.fragments, self.name)
        for name, content in self.files.items():
            path = directory / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return [*names, *self.files]


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended; `error` is empty when it was committed."""

    step: int
    error: str


class CheckpointWriter:
    """Commits the snapshots of all ranks under `root`. Methods are collective over all ranks unless they say otherwise.

    Args:
        keep_last, keep_every: what `prune` keeps.
        background: train on while files are written.
    """

    def __init__(self, root: Path, *, keep_last: int, keep_every: int, background: bool) -> None:
        self._root = root
        self._keep_last, self._keep_every = keep_last, keep_every
        self._background = background
        self._exchange = HostExchange()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: tuple[int, Future[None]] | None = None
        self._outcomes: list[SaveOutcome] = []
        self._complained: set[str] = set()

    def save(self, step: int, description: dict[str, Any], snapshot: Callable[[], Snapshot]) -> None:
        """Take a snapshot and have it committed as `step`; waits for the save before."""
        self._collect(block=True)
        taken = snapshot()
        self._running = step, self._pool.submit(self._write, step, description, taken)
        if not self._background:
            self._collect(block=True)

    def outcomes(self) -> list[SaveOutcome]:
        """The saves that ended since the last call, on this rank. Waits for nothing and is not collective."""
        self._collect(block=False)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def finish(self) -> list[SaveOutcome]:
        """`outcomes` when nothing is under way any more."""
        self._collect(block=True)
        return self.outcomes()

    def _collect(self, *, block: bool) -> None:
        if self._running is None or not (block or self._running[1].done()):
            return
        (step, running), self._running = self._running, None
        error = ""
        try:
            running.result()
        except UserError as caught:  # the same on every rank
            error = str(caught)
        self._outcomes.append(SaveOutcome(step, error))

    def close(self) -> None:
        """End the background thread; a save that is under way is not waited for and will never be committed."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._running is None:
            self._exchange.close()

    def _write(self, step: int, description: dict[str, Any], snapshot: Snapshot) -> None:
        commit(self._root, step, description, snapshot.write, self._exchange)
        if dist.get_rank() == 0:
            refused = prune(self._root, self._keep_last, self._keep_every)
            for name in sorted(refused.keys() - self._complained):
                log.warning(
                    "%s cannot be deleted (%s); training continues, delete it by hand", self._root / name, refused[name]
                )
            self._complained |= refused.keys()
