"""SIGKILL at any moment: a run that is killed again and again ends as if nothing had happened.

Two real ranks; a random one is killed before a random operation: a step, a file, a flush, the rename, the pointer. Then
both are started again, and so on. `bash launch/test.sh --faults` does it twenty times, the tests three times.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nextlat_dist.checkpoint.commit import find_checkpoint, verify
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

RANKS = 2
SAVE_EVERY = 2


def config(output: Path, dataset: Path, steps: int) -> dict[str, object]:
    training = {"train_tokens": steps * 4 * 48, "validation_batches": 0}
    raw = training_config(output, dataset, {"zero_stage": 1}, training)
    return {**raw, "checkpoint": {"save_interval": SAVE_EVERY, "keep_last": 2}}


def start(path: Path, victim: int | None, operation: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS)}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.kit.fault_rank", str(operation if rank == victim else 0), str(path)]
        ranks.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
            )
        )
    return ranks


def finish(ranks: list[subprocess.Popen[str]], timeout_seconds: float = 240) -> tuple[list[int], str]:
    """Exit statuses and everything that was said; when one rank has ended badly the others get little time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        if any(rank.poll() not in (None, 0) for rank in ranks):
            deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.1)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    said = "".join(part for rank in ranks for part in rank.communicate())
    return [rank.returncode for rank in ranks], said


def survive(tmp_path: Path, dataset: Path, two_ranks: Ranks, kills: int, seed: int) -> None:
    steps = 4 + 2 * kills
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    two_ranks.run(run_training, config(whole, dataset, steps))
    path = tmp_path / "cut.yaml"
    path.write_text(yaml.safe_dump(config(cut, dataset, steps)))
    choose = random.Random(seed)
    moments: list[str] = []
    attempts = 0
    while True:
        victim, operation = choose.randrange(RANKS), choose.randint(1, 24)
        ranks = start(path, victim if len(moments) < kills else None, operation)
        statuses, said = finish(ranks)
        attempts += 1
        if statuses == [0] * RANKS:
            break
        assert attempts < 3 * kills + 5, said
        killed = re.findall(r"killed before (\w+)", said)
        assert killed, said  # nothing else may end a run
        moments += killed
        before = 0
        resumed = re.search(r"resumed at step (\d+)", said)
        reached = [int(step) for step in re.findall(r"^step (\d+)/", said, re.MULTILINE)]
        found = find_checkpoint(cut / "checkpoints")
        if found is not None:
            verify(found)
            before = int(found.name.removeprefix("step_"))
        elif reached:
            assert max(reached) <= 2 * SAVE_EVERY, "nothing was committed for two intervals"
        if resumed is not None:
            assert before >= int(resumed[1]), "a commit was lost"
        # The save of an interval may still be on its way when the next one begins.
        assert not reached or max(reached) - before <= 2 * SAVE_EVERY, (moments, reached, before)
    assert len(moments) > kills // 2, moments  # a run may end before the operation that was drawn
    expected, found_lines = logged(whole), logged(cut)
    assert found_lines == expected
    final = f"checkpoints/step_{steps:08d}"
    for folder in ("weights", "optimizer"):
        names = sorted(file.name for file in (whole / final / folder).iterdir())
        assert names == sorted(file.name for file in (cut / final / folder).iterdir())
        for name in names:
            assert (whole / final / folder / name).read_bytes() == (cut / final / folder / name).read_bytes(), name
    print(f"{len(moments)} kills: {', '.join(moments)}")


def test_killed_three_times(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    survive(tmp_path, text_dataset, two_ranks, kills=3, seed=3)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_twenty_times(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    survive(tmp_path, text_dataset, two_ranks, kills=20, seed=20)
