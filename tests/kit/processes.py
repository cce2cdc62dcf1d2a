"""Processes that are waited for, and those they started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(12000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened within two minutes")


def running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def descendants(process_id: int) -> list[int]:
    try:
        children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(c) for c in children] + [d for c in children for d in descendants(int(c))]
