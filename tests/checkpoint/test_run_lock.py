"""Of two runs in one output_dir the second is refused by name; a dead run's lock is no obstacle.

Command: `pytest tests/checkpoint/test_run_lock.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.checkpoint.run_lock import RunLock, Use, in_use, process_started, take_lock
from nextlat_dist.errors import UserError

FAST: dict[str, Any] = {"beat_seconds": 0.05, "stale_seconds": 0.4}
TAKE_AND_DIE = (
    "import os, sys; from pathlib import Path; from nextlat_dist.checkpoint.run_lock import take_lock\n"
    "take_lock(Path(sys.argv[1])); print(os.getpid(), flush=True); os._exit(0)"
)


def content(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "run.lock").read_text())
    return found


def left_by_another_machine(directory: Path, **changes: Any) -> None:
    lock = take_lock(directory, beat_seconds=1000)
    left = {**content(directory), "machine": "of another boot", "host": "elsewhere", "pid": 4711, **changes}
    lock.release()
    (directory / "run.lock").write_text(json.dumps(left))


def test_a_second_run_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    first = content(tmp_path)
    with pytest.raises(UserError) as refused:
        take_lock(tmp_path)
    for part in (str(tmp_path), first["host"], f"pid {os.getpid()}", first["since"], "choose another output_dir"):
        assert part in str(refused.value)
    assert in_use(tmp_path) == Use(str(refused.value), certain=True)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    assert in_use(tmp_path) is None
    take_lock(tmp_path).release()


def test_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", TAKE_AND_DIE, str(tmp_path)], capture_output=True, check=True)
    assert content(tmp_path)["pid"] == int(ended.stdout)
    began = time.monotonic()
    assert in_use(tmp_path) is None
    lock = take_lock(tmp_path)
    assert time.monotonic() - began < 2, "this machine can see that it is gone"
    lock.release()


def test_its_number_may_be_another_process_now(tmp_path: Path) -> None:
    take_lock(tmp_path, beat_seconds=1000)  # of this process, which lives
    old = content(tmp_path)
    assert old["started"] == process_started(os.getpid())
    (tmp_path / "run.lock").write_text(json.dumps({**old, "started": old["started"] - 1}))
    take_lock(tmp_path).release()


def test_another_machine_that_beats_is_alive(tmp_path: Path) -> None:
    left_by_another_machine(tmp_path)
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(0.02):
            number += 1
            temporary = tmp_path / "beat"
            temporary.write_text(json.dumps({**left, "beats": number}))
            temporary.rename(tmp_path / "run.lock")

    left = content(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by the run on host elsewhere, pid 4711"):
            take_lock(tmp_path, beat_seconds=0.1, stale_seconds=30)
    finally:
        over.set()
        thread.join()
    use = in_use(tmp_path)
    assert use is not None
    assert not use.certain, "from here nobody can tell without waiting"
    assert "its last sign of life is 0 s old; it counts as dead after 60 s" in use.text


def test_another_machine_without_a_beat_is_dead(tmp_path: Path) -> None:
    left_by_another_machine(tmp_path)
    said: list[str] = []
    began = time.monotonic()
    lock = take_lock(tmp_path, waiting=said.append, **FAST)
    assert 0.3 <= time.monotonic() - began < 10
    assert len(said) == 1
    assert "elsewhere" in said[0]
    lock.release()
    left_by_another_machine(tmp_path)
    os.utime(tmp_path / "run.lock", (0, 0))
    assert in_use(tmp_path) is None


def test_the_same_launch_script_starts_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by_another_machine(tmp_path, launch="script-1")
    monkeypatch.setenv("NEXTLAT_LAUNCH", "script-2")
    use = in_use(tmp_path)
    assert use is not None
    assert "elsewhere" in use.text
    monkeypatch.setenv("NEXTLAT_LAUNCH", "script-1")
    assert in_use(tmp_path) is None
    take_lock(tmp_path, beat_seconds=1000, stale_seconds=1000).release()


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"host": 1}', "\0"])
def test_a_lock_that_cannot_be_read_holds_nobody_up_for_ever(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(text)
    assert in_use(tmp_path) is None
    take_lock(tmp_path, **FAST).release()


def test_a_run_that_lost_its_lock_is_told_and_leaves_the_new_one(tmp_path: Path) -> None:
    lost: list[str] = []
    lock = take_lock(tmp_path, lost=lost.append, beat_seconds=0.02)
    new = {**content(tmp_path), "token": "another", "host": "elsewhere", "pid": 4711}
    temporary = tmp_path / "new"
    temporary.write_text(json.dumps(new))
    for _ in range(500):
        os.replace(temporary, tmp_path / "run.lock") if temporary.exists() else None
        if lost:
            break
        time.sleep(0.02)
        temporary.write_text(json.dumps(new))
    assert "the run on host elsewhere, pid 4711" in lost[0]
    lock.release()
    assert content(tmp_path)["token"] == "another"


def test_the_lock_is_shown_to_live(tmp_path: Path) -> None:
    lock = take_lock(tmp_path, beat_seconds=0.02)
    deadline = time.monotonic() + 30
    while content(tmp_path)["beats"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (tmp_path / "run.lock").unlink()  # by a hand that thought it stale
    while not (tmp_path / "run.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lock.release()


def test_one_of_many_takes_a_dead_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", TAKE_AND_DIE, str(tmp_path)], capture_output=True, check=True)
    taken: list[RunLock] = []
    refused: list[str] = []

    def run() -> None:
        try:
            taken.append(take_lock(tmp_path))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 7)
    taken[0].release()
