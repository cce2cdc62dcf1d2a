"""Being asked to stop: SIGTERM and SIGUSR1 (Slurm's warning before pre-emption) set a flag that training looks at.

Invariant: the first signal never interrupts anything. All ranks agree on a step in the exchange they make before every
optimizer step (`guards.StepGuard`); there the run is saved and ends with `EXIT_STOPPED`. A signal that comes later than
`REPEAT_SECONDS` after the first ends the process at once; launchers pass on what the process group got too, so two
signals at nearly the same time are one.

    kill -TERM PID      (any one rank, or the launcher)
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved; the same command resumes
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REPEAT_SECONDS = 5.0


class StoppedBySignal(Exception):
    """The command's run was saved at `step` because a rank was asked to stop. Raised on every rank."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step} as asked by a signal; the same command resumes there")
        self.step = step


class StopRequest:
    """A signal handler that remembers.

    Attributes:
        requested: a signal came.
    """

    def __init__(self, repeat_seconds: float = REPEAT_SECONDS) -> None:
        self._repeat_seconds = repeat_seconds
        self._first: float | None = None

    @property
    def requested(self) -> bool:
        return self._first is not None

    def install(self) -> StopRequest:
        """Handle the stop signals of this process; main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self)
        return self

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first >= self._repeat_seconds:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
