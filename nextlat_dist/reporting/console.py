"""The console: text for the person who typed the command, and the progress of what takes long."""

from __future__ import annotations

import sys
import time


def say(text: str, *, error: bool = False) -> None:
    """One message, at once: results on stdout; with `error` what is no result (problems, progress) on stderr."""
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


class Progress:
    """Lines on stderr, at most one every two seconds: units done, tokens per second so far, time left."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.label, self.total, self.shown = label, total, shown
        self.done = self.tokens = 0
        self.started = self.printed = time.monotonic()

    def add(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if self.shown and (now - self.printed >= 2 or self.done == self.total):
            self.printed = now
            elapsed = max(now - self.started, 1e-9)
            left = elapsed / self.done * (self.total - self.done)
            rate = f"{self.tokens / elapsed:,.0f} tokens/s"
            say(f"{self.label}: {self.done}/{self.total}, {rate}, {left:.0f} s left", error=True)
