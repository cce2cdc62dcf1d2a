"""The log of a run, and the speed that it tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config import load_config
from nextlat_dist.plan.counting import flops_per_token
from nextlat_dist.training import metrics
from nextlat_dist.training.engine.time_split import PARTS
from nextlat_dist.training.metrics import METRICS_FILE, MetricsLog, Throughput, format_duration
from tests.kit.harness import Ranks
from tests.kit.training.runs import run_training, training_config


def test_throughput_and_mfu_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    config = load_config(None, ["training.peak_tflops_per_device=2"])
    throughput = Throughput(config, devices=4)
    assert throughput.peak_source == "training.peak_tflops_per_device"
    throughput.count(1000, 1000 * 256)  # every position attends to a whole row
    throughput.count(3000, 3000 * 256)
    now = 102.0
    speed, utilisation = throughput.read()
    assert speed == 2000
    assert utilisation == pytest.approx(2000 * flops_per_token(config) / (4 * 2e12))
    throughput.count(500, 500)
    now = 112.0  # a validation run, which does not count
    throughput.restart()
    throughput.count(600, 600)
    now = 113.0
    assert throughput.read()[0] == 600


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / METRICS_FILE).read_text().splitlines()]


def test_a_resume_drops_what_was_lost_and_goes_on(tmp_path: Path) -> None:
    config = load_config(None)
    log = MetricsLog(config, tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write({"step": step, "loss": 1.0 / step})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # the kill
    log = MetricsLog(config, tmp_path, 2)
    log.write({"step": 3, "loss": 0.5})
    assert steps(tmp_path) == [1, 2, 3]
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[2]) == {"step": 3, "loss": 0.5}
    assert log.wandb_id is None


def test_a_fresh_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n')
    MetricsLog(load_config(None), tmp_path, 0)
    assert steps(tmp_path) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0m00s"), (59.9, "0m59s"), (61, "1m01s"), (3600, "1h00m"), (7384, "2h03m"), (1e6, "277h46m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def with_known_parts(raw: dict[str, Any]) -> int:
    """A run whose clocks say what is known: rank r spends r + 1 seconds in each part, and has r + 1 GB. How often the
    clocks were started anew.
    """
    import torch.distributed as dist

    from nextlat_dist.training import loop
    from nextlat_dist.training.engine.time_split import PARTS, TimeSplit

    restarts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimeSplit, "read", lambda self: dict.fromkeys(PARTS, float(dist.get_rank() + 1)))
        patch.setattr(TimeSplit, "restart", lambda self: restarts.append(1))
        patch.setattr(loop, "take_peak_memory", lambda device: 1e9 * (dist.get_rank() + 1))
        run_training(raw)
    return len(restarts)


def test_parts_of_a_step_are_means_over_steps_and_ranks(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    raw = training_config(tmp_path, text_dataset, {"zero_stage": 1}, {"log_interval": 2, "validation_interval": 3})
    restarts = two_ranks.run(with_known_parts, {**raw, "checkpoint": {"save_interval": 0}})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = {1: 1, 2: 1, 4: 1, 6: 2}  # since the line before, or since the validation after step 3
    found = {line["step"]: line for line in lines if "loss" in line}
    assert found.keys() == steps.keys()
    for step, line in found.items():
        assert {line[f"seconds/{part}"] for part in PARTS} == {1.5 / steps[step]}, step
        assert line["peak_memory_gigabytes"] == [1.0, 2.0]
    assert restarts[0] == restarts[1] >= 4  # at the beginning, after two validations, after the last save
