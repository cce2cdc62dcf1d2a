"""The time of the parts of a training step, taken without asking a device while it works.

On a GPU the ends of parts are events in its stream, read when they are long past; on a CPU they are the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "reduce", "pipeline", "step", "other")
FOLD_AFTER = 1024  # events kept before the old ones are added up
OF_A_PIPELINE = {  # instructions of DeepSpeed's schedule
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "SendActivation": "pipeline",
    "RecvActivation": "pipeline",
    "SendGrad": "pipeline",
    "RecvGrad": "pipeline",
    "ReduceGrads": "reduce",
    "ReduceTiedGrads": "reduce",
    "OptimizerStep": "step",
}


class TimeSplit:
    """Seconds of every part of training since the last `read`; a part inside another counts for itself alone.

    `pipeline` is messages between stages, waiting for them included. On a GPU, time that its stream waits for the host
    counts for the part in which it waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = ["other"]
        self._marks: list[tuple[str, Any]] = []  # what ended, and when
        self._last = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time inside is of this part."""
        self._mark()
        self._inside.append(name)
        try:
            yield
        finally:
            self._mark()
            self._inside.pop()

    def timed(self, part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, whose time counts for `part`."""

        def timed(*arguments: Any, **named: Any) -> Any:
            with self.part(part):
                return run(*arguments, **named)

        return timed

    def read(self) -> dict[str, float]:
        """Seconds of each of `PARTS` since the last call or `restart`; waits for the device."""
        self._mark()
        self._fold(len(self._marks))
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def restart(self) -> None:
        """Forget what was since the last `read`."""
        self._marks.clear()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = self._now()

    def _mark(self) -> None:
        self._marks.append((self._inside[-1], self._now()))
        if len(self._marks) > FOLD_AFTER:
            self._fold(FOLD_AFTER // 2)

    def _fold(self, count: int) -> None:
        """Add up the oldest marks."""
        for name, at in self._marks[:count]:
            if self._cuda:
                at.synchronize()
                self._seconds[name] += self._last.elapsed_time(at) / 1000
            else:
                self._seconds[name] += at - self._last
            self._last = at
        del self._marks[:count]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
