"""The ties between a rank and what started it: it ends when its launcher is gone, and tells how the run ended.

A launcher that is killed cannot end its ranks, and neither DeepSpeed's nor torch's has them told. Every rank therefore
looks, each `WATCH_SECONDS`, whether the processes between it and the launch script are still there. What they are says
the environment, which the launch scripts set:

    NEXTLAT_LAUNCHER=PID:STARTED   the launch script, on this machine
    NEXTLAT_LAUNCHER=ssh           what serves the connection from the script's host
    (unset)                        the parent alone, where there is a launcher at all (RANK is set)

NEXTLAT_END_MARK names a file: it says `began` from the start on, and in the end the exit status that the run came to.
The scripts trust it and not their launcher, of which a killed part may look like a clean end.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from nextlat_dist.checkpoint.run_lock import process_fields, process_started
from nextlat_dist.files import write_whole

WATCH_SECONDS = 1.0  # ranks are to end within seconds (docs/faults.md); a look reads a few small files of /proc
EXIT_LAUNCHER_GONE = 76  # as for a stalled rank: the same command resumes from the last checkpoint
LAUNCHER, END_MARK = "NEXTLAT_LAUNCHER", "NEXTLAT_END_MARK"
BEGAN = "began"


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Have this process end, from now on, as soon as what launched it is gone."""
    watched = launchers(environment)
    if watched != {}:
        threading.Thread(target=_watch, args=(watched,), name="launcher", daemon=True).start()


def launchers(environment: Mapping[str, str]) -> dict[int, int] | None:
    """Process → its start, of all between this one and its launch script, which belongs to them; empty where nobody
    launched this process; None when the script is gone already."""
    found: dict[int, int] = {}
    if "RANK" not in environment or process_started(os.getpid()) is None:  # or no /proc to look into
        return found
    named, pid, session = environment.get(LAUNCHER, ""), os.getppid(), os.getsid(0)
    if not named and pid <= 1:
        return found
    while True:
        fields, started = process_fields(pid), process_started(pid)
        here = named == f"{pid}:{started}"
        if fields is None or started is None or (pid == 1 and not here):  # an orphan: the first process took it in
            return None
        found[pid] = started
        if not named or here or (named == "ssh" and int(fields[3]) != session):
            return found
        pid = int(fields[1])


def mark_checked(environment: Mapping[str, str] = os.environ) -> None:
    """Tell a launch script, before it starts ranks, that this project's ranks will leave a mark."""
    _mark(environment, "checked")


def mark_began(environment: Mapping[str, str] = os.environ) -> None:
    """Say that the run began, on the rank that speaks for its script."""
    _mark(environment, BEGAN)


def mark_end(status: int, environment: Mapping[str, str] = os.environ) -> None:
    """Say that the run came to its end with this exit status."""
    _mark(environment, str(status))


def _mark(environment: Mapping[str, str], text: str) -> None:
    path = environment.get(END_MARK)
    # The first rank of the script's host; over ssh there is one script for all hosts, and it asks the first.
    first = "RANK" if environment.get(LAUNCHER) == "ssh" else "LOCAL_RANK"
    if path and environment.get(first, "0") == "0":
        with contextlib.suppress(OSError):  # the script then takes the run for one that did not come to its end
            write_whole(Path(path), text + "\n", durable=False)


def _watch(watched: dict[int, int] | None) -> None:
    while watched is not None and all(process_started(pid) == started for pid, started in watched.items()):
        time.sleep(WATCH_SECONDS)
    with contextlib.suppress(OSError):
        rank = os.environ.get("RANK", "0")
        os.write(2, f"rank {rank}: what launched it is gone: it ends, the last checkpoint stands\n".encode())
    os._exit(EXIT_LAUNCHER_GONE)  # the main thread may be in a collective that no exception can reach
