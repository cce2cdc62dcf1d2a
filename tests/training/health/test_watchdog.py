"""A rank that stops, dies or stalls is named, and the job ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.training.health.watchdog import EXIT_STALLED, Beat, Watchdog, lost_connection, name_culprits, slowest
from tests.kit.harness import Ranks
from tests.kit.training.ranks import last_step, running_ranks, wait_until
from tests.kit.training.runs import run_training, training_config

HOST = "node7"
WAITING = Beat(0, HOST, 100, ticks=5, progress=9, step=4, phase="training step", where="a.py:1 in f", waiting=True)


def beats(*changes: dict[str, Any]) -> list[Beat | None]:
    return [replace(WAITING, rank=rank, pid=100 + rank, **change) for rank, change in enumerate(changes)]


def test_a_rank_that_does_not_tick_is_named() -> None:
    before, after = beats({}, {}, {}), beats({"ticks": 6}, {}, {"ticks": 6})
    assert name_culprits(before, after) == (
        "rank 1 (host node7, pid 101) does not answer since step 4, training step, a.py:1 in f: stopped, killed, or "
        "its host is gone"
    )


def test_a_rank_without_a_file_is_named() -> None:
    assert name_culprits(beats({}, {}), [*beats({"ticks": 6}), None]).startswith("rank 1 is unknown")


def test_a_rank_that_ended_is_named_before_one_that_is_silent() -> None:
    before = beats({}, {"ended": "OSError: disk on fire"}, {})
    after = beats({"ticks": 6}, {"ended": "OSError: disk on fire"}, {})
    assert name_culprits(before, after).startswith("rank 1 (host node7, pid 101) ended with OSError: disk on fire in ")


def test_the_rank_that_waits_for_nobody_is_named() -> None:
    busy = {"ticks": 6, "waiting": False, "phase": "reading data", "where": "loader.py:3 in read"}
    named = name_culprits(beats({}, {}, {}), beats({"ticks": 6}, busy, {"ticks": 6, "progress": 8}))
    assert named == "rank 1 (host node7, pid 101) makes no progress in step 4, reading data, loader.py:3 in read"


def test_where_all_wait_the_last_one_is_named() -> None:
    named = name_culprits(beats({}, {}, {}), beats({"ticks": 6}, {"ticks": 6}, {"ticks": 6, "progress": 8}))
    assert named.startswith("rank 2 ")
    assert ";" not in named


def works_on(device_works: bool, directory: Path) -> dict[str, Any]:
    """What the file of a rank says whose main thread is in no collective."""
    with Watchdog(directory, 0, 1, 0.4, lambda: device_works) as watchdog:
        for _ in range(40):
            watchdog.beat(1, "training step")
            time.sleep(0.01)
    return json.loads((directory / "watchdog" / "rank_0.json").read_text())  # type: ignore[no-any-return]


def test_a_rank_whose_device_is_not_done_waits(tmp_path: Path, one_rank: Ranks) -> None:
    """Under NCCL a collective is a kernel: the main thread meets it in whatever line reads a number."""
    for device_works in (True, False):
        (found,) = one_rank.run(works_on, device_works, tmp_path / str(device_works))
        assert found["waiting"] is device_works


def test_slowest() -> None:
    assert slowest([1.0, 3.0]) == (1, 3.0)
    assert slowest([2.0, 1.0, 2.0, 5.0, 2.0]) == (3, 2.5)
    assert slowest([1.0]) is None
    assert slowest([0.0, 0.0, 1.0]) is None


def test_what_says_that_a_connection_was_lost() -> None:
    import torch.distributed as dist

    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    assert lost_connection(RuntimeError(gloo))
    assert lost_connection(dist.DistBackendError("NCCL error"))
    assert not lost_connection(RuntimeError("shapes cannot be multiplied"))
    assert not lost_connection(OSError(gloo))


@pytest.mark.parametrize("number", [pytest.param(signal.SIGSTOP, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_stopped_or_killed_rank_is_named_and_the_others_end(
    number: signal.Signals, tmp_path: Path, text_dataset: Path
) -> None:
    raw = training_config(tmp_path, text_dataset, {"zero_stage": 1}, {"train_tokens": 100_000 * 4 * 48})
    raw["checkpoint"] = {"save_interval": 0}
    # A stopped process keeps its connections; a lost one is noticed at once, however long a stall may last.
    raw["watchdog"] = {"timeout_seconds": 8.0 if number == signal.SIGSTOP else 600.0}
    with running_ranks(raw, 2) as ranks:
        wait_until(lambda: last_step(tmp_path) >= 2, ranks)
        ranks[1].send_signal(number)
        output = ranks[0].communicate(timeout=120)[0]
    assert ranks[0].returncode == EXIT_STALLED, output
    named = f"rank 1 (host {socket.gethostname()}, pid {ranks[1].pid}) does not answer since step "
    assert f"watchdog of rank 0: {named}" in output
    assert (tmp_path / "watchdog" / "verdict.txt").read_text().startswith(named)
    stacks = (tmp_path / "watchdog" / "rank_0.stacks.txt").read_text()
    assert "in run" in stacks
    assert "Current thread" in output


STALLING = """import os, sys, time
from nextlat_dist.data.loader import RowLoader
original = RowLoader.next_batch
def next_batch(self):
    if os.environ["RANK"] == "1" and self.cursor.row >= 8:
        time.sleep(1000)
    return original(self)
RowLoader.next_batch = next_batch
from nextlat_dist.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_that_hangs_by_itself_is_named_with_its_line(tmp_path: Path, text_dataset: Path) -> None:
    raw = training_config(tmp_path, text_dataset, {"zero_stage": 1}, {"train_tokens": 100_000 * 4 * 48})
    raw["watchdog"] = {"timeout_seconds": 6.0}
    with running_ranks(raw, 2, ["-c", STALLING]) as ranks:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    where = "in step 2, reading data ahead, "
    named = f"rank 1 (host {socket.gethostname()}, pid {ranks[1].pid}) makes no progress {where}"
    for rank, output in enumerate(outputs):
        assert ranks[rank].returncode == EXIT_STALLED, output
        assert f"watchdog of rank {rank}: {named}<string>:6 in next_batch" in output
    assert "in next_batch" in (tmp_path / "watchdog" / "rank_1.stacks.txt").read_text()


def test_what_another_rank_found_ends_this_one(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from nextlat_dist.parallel.dims import initialize_distributed\n"
        "from nextlat_dist.training.health.watchdog import DIRECTORY, VERDICT, Watchdog\n"
        "initialize_distributed()\n"
        "with Watchdog(Path(sys.argv[1]), 0, 1, 600.0):\n"
        "    Path(sys.argv[1], DIRECTORY, VERDICT).write_text('rank 5 is gone')\n"
        "    time.sleep(1000)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == EXIT_STALLED
    assert ended.stderr.startswith("watchdog of rank 0: rank 5 is gone\n")


def slow_rank(raw: dict[str, Any], seconds: float) -> None:
    """Train with a rank 1 that takes this much longer for every step, outside of collectives."""
    import torch.distributed as dist

    from nextlat_dist.training.engine.deepspeed_engine import DeepSpeedEngine as Engine

    original = Engine.train_step

    def slow(self: Engine, *arguments: Any) -> Any:
        time.sleep(seconds if dist.get_rank() == 1 else 0)
        return original(self, *arguments)

    Engine.train_step = slow  # type: ignore[method-assign]
    try:
        run_training(raw)
    finally:
        Engine.train_step = original  # type: ignore[method-assign]


def test_a_slow_rank_is_in_the_metrics(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    raw = training_config(tmp_path, text_dataset, {"zero_stage": 1}, {"log_interval": 6, "validation_batches": 0})
    raw["checkpoint"] = {"save_interval": 0}
    two_ranks.run(slow_rank, raw, 2.0)  # far longer than a step takes on a busy machine
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 6 and "loss" in line]
    assert last["straggler_rank"] == 1
    assert last["straggler_ratio"] > 1.5


def failing(directory: Path) -> dict[str, Any]:
    """What the others can read of a rank whose training failed."""
    with contextlib.suppress(OSError), Watchdog(directory, 0, 1, 60.0) as watchdog:
        watchdog.beat(7, "saving")
        raise OSError("disk on fire")
    return json.loads((directory / "watchdog" / "rank_0.json").read_text())  # type: ignore[no-any-return]


def test_an_exception_is_there_for_the_others_to_read(tmp_path: Path, one_rank: Ranks) -> None:
    (found,) = one_rank.run(failing, tmp_path)
    assert (found["step"], found["phase"], found["ended"]) == (7, "saving", "OSError: disk on fire")


def threads_after(raw: dict[str, Any]) -> set[str]:
    run_training(raw)
    return {thread.name for thread in threading.enumerate()}


def test_a_timeout_of_zero_switches_it_off_and_nothing_outlives_a_run(
    tmp_path: Path, text_dataset: Path, one_rank: Ranks
) -> None:
    raw = training_config(tmp_path / "off", text_dataset, {"zero_stage": 0}, {"train_tokens": 4 * 48})
    raw["watchdog"] = {"timeout_seconds": 0}
    one_rank.run(run_training, raw)
    assert not (tmp_path / "off" / "watchdog").exists()
    del raw["watchdog"]
    (threads,) = one_rank.run(threads_after, {**raw, "output_dir": str(tmp_path / "on")})
    assert "watchdog" not in threads
    assert (tmp_path / "on" / "watchdog" / "rank_0.json").exists()
    assert "straggler_rank" not in (tmp_path / "on" / "metrics.jsonl").read_text()
