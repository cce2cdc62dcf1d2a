"""Child processes of a grid: how they are stopped, how cores are shared, and how long the lock is held."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.experiments.processes import Processes, locked


def test_stopping_ends_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    with locked(tmp_path) as lock, (tmp_path / "log").open("wb") as log:
        processes = Processes(lock, 1)
        statuses: list[int] = []
        code = "import time; print('up', flush=True); time.sleep(100)"
        thread = threading.Thread(target=lambda: statuses.append(processes.run((sys.executable, "-c", code), log)))
        thread.start()
        while not (tmp_path / "log").read_text():
            time.sleep(0.01)
        processes.stop()
        thread.join(timeout=60)
        assert statuses == [-signal.SIGTERM]
        assert processes.run((sys.executable, "-c", ""), log) == -1


def test_cores_are_shared_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'])")
    for given, expected in ((None, str(max(1, len(os.sched_getaffinity(0)) // 2))), ("7", "7")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with locked(tmp_path) as lock, (tmp_path / "log").open("wb") as log:
            assert Processes(lock, 2).run(code, log) == 0
        assert (tmp_path / "log").read_text().strip() == expected


def test_the_lock_outlives_a_grid_that_left_a_process(tmp_path: Path) -> None:
    code = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)")
    with (tmp_path / "log").open("wb") as log:
        with locked(tmp_path) as lock:
            processes = Processes(lock, 1)
            thread = threading.Thread(target=processes.run, args=(code, log))
            thread.start()
            while not (tmp_path / "log").read_bytes():
                time.sleep(0.01)
        with pytest.raises(UserError, match="another grid, or a process that it left running"), locked(tmp_path):
            pass
        processes.stop()
        thread.join(timeout=60)
    with locked(tmp_path):
        pass
