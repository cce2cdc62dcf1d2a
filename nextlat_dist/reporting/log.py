"""Events and warnings of ranks, with rank, time, level and module, on standard error.

    log = logger(__name__)
    log.warning("rank %d is slow", other)

writes `2026-01-31 12:00:00 rank 3 WARNING training.loop: rank 5 is slow`.

Quiet by default: warnings and errors only. `NEXTLAT_LOG=info` (or `debug`) shows more. What a person reads on the
console, such as a table or a result, is no log line: that is `reporting/console.py`.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from nextlat_dist.errors import without_secrets

ROOT = "nextlat_dist"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Formatter(logging.Formatter):
    """A line never holds the password or signature of a URL, in the text of an exception either."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at that moment, so that redirecting it works."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_Formatter("%(asctime)s %(rank)s%(levelname)s %(where)s: %(message)s", "%F %T"))

    def emit(self, record: logging.LogRecord) -> None:
        rank = os.environ.get("RANK")  # read now: a launcher's variable may be set after the import
        record.rank = "" if rank is None else f"rank {rank} "
        record.where = record.name.removeprefix(f"{ROOT}.")
        self.stream = sys.stderr
        super().emit(record)


def logger(name: str) -> logging.Logger:
    """The logger of module `name`, below the one of this project.

    A program that uses the package as a library and configures logging itself may remove the handler of
    `logging.getLogger("nextlat_dist")` and set `propagate`.
    """
    root = logging.getLogger(ROOT)
    if not any(isinstance(handler, _StandardError) for handler in root.handlers):
        root.addHandler(_StandardError())
        root.propagate = False
        wanted = os.environ.get("NEXTLAT_LOG", "warning").lower()
        root.setLevel(LEVELS.get(wanted, logging.WARNING))
        if wanted not in LEVELS:
            root.warning("NEXTLAT_LOG is %r, it must be one of %s; using warning", wanted, ", ".join(LEVELS))
    return root if name == ROOT else root.getChild(name.removeprefix(f"{ROOT}."))
