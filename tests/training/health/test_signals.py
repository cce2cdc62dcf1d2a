"""Asked to stop, a run saves and ends; resuming from there gives the run that was never stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.training.health.signals import EXIT_STOPPED, StopRequest
from tests.kit.harness import Ranks
from tests.kit.training.ranks import last_step, running_ranks, wait_until
from tests.kit.training.runs import logged, run_training, training_config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_handler_remembers_and_a_second_signal_ends_the_process(number: signal.Signals) -> None:
    script = (
        "import os, signal, time\n"
        "from nextlat_dist.training.health.signals import StopRequest\n"
        "assert not StopRequest().requested\n"
        "stop = StopRequest(repeat_seconds=0.5).install()\n"
        "assert signal.getsignal(signal.SIGTERM) is stop and not stop.requested\n"
        f"os.kill(os.getpid(), {int(number)}); os.kill(os.getpid(), {int(number)})\n"
        "assert stop.requested\n"
        "print('alive', flush=True)\n"
        "time.sleep(0.6)\n"
        f"os.kill(os.getpid(), {int(number)})\n"
        "print('still alive', flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-number, "alive\n"), ended.stderr


def test_without_a_handler_nothing_is_requested() -> None:
    assert not StopRequest().requested


def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"

    def configured(output: Path, steps: int) -> dict[str, Any]:
        raw = training_config(output, text_dataset, {"zero_stage": 1}, {"train_tokens": steps * 4 * 48})
        raw["checkpoint"] = {"save_interval": 0}
        return raw

    with running_ranks(configured(stopped, 100_000), 2) as ranks:
        wait_until(lambda: last_step(stopped) >= 2, ranks)
        ranks[1].send_signal(signal.SIGTERM)
        asked_at = last_step(stopped)
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_STOPPED] * 2, outputs
    (checkpoint,) = (stopped / "checkpoints").glob("step_*")
    step = int(checkpoint.name.removeprefix("step_"))
    assert asked_at <= step <= asked_at + 10
    assert f"stopped at step {step} as asked by a signal" in outputs[0]
    assert last_step(stopped) == step

    two_ranks.run(run_training, configured(whole, step + 3))
    two_ranks.run(run_training, configured(stopped, step + 3))
    assert logged(stopped) == logged(whole)
    final = f"checkpoints/step_{step + 3:08d}"
    saved = [path for part in ("weights", "optimizer") for path in (whole / final / part).iterdir()]
    names = sorted(path.relative_to(whole) for path in saved)
    assert names
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


def test_a_signal_while_starting_is_honoured_at_the_first_step(tmp_path: Path, text_dataset: Path) -> None:
    raw = training_config(tmp_path, text_dataset, {"zero_stage": 0}, {"train_tokens": 100_000 * 4 * 48})
    with running_ranks(raw, 1) as (rank,):
        status = Path(f"/proc/{rank.pid}/status")
        wait_until(lambda: _handles(status, signal.SIGTERM), [rank])
        rank.send_signal(signal.SIGTERM)
        assert not (tmp_path / "metrics.jsonl").exists()
        output = rank.communicate(timeout=120)[0]
    assert rank.returncode == EXIT_STOPPED, output
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]


def _handles(status: Path, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for this signal."""
    caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
