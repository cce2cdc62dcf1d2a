"""Time counts for the innermost part, once, however many marks there are."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextlat_dist.training.engine import time_split
from nextlat_dist.training.engine.time_split import PARTS, TimeSplit
from tests.kit import jobs
from tests.kit.harness import Ranks


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_split.time, "perf_counter", clock)
    return clock


def a_step(split: TimeSplit, clock: Clock) -> None:
    clock.now += 1  # outside
    with split.part("backward"):
        clock.now += 10
        with split.part("reduce"):
            clock.now += 100
        clock.now += 1000


def test_a_part_inside_another_counts_for_itself(clock: Clock) -> None:
    split = TimeSplit(torch.device("cpu"))
    a_step(split, clock)
    expected = {**dict.fromkeys(PARTS, 0.0), "other": 1.0, "backward": 1010.0, "reduce": 100.0}
    assert split.read() == expected
    assert set(split.read().values()) == {0.0}
    a_step(split, clock)
    split.restart()
    a_step(split, clock)
    assert split.read() == expected


def test_an_exception_ends_a_part(clock: Clock) -> None:
    split = TimeSplit(torch.device("cpu"))
    with contextlib.suppress(KeyError), split.part("forward"):
        clock.now += 5
        raise KeyError
    clock.now += 7
    found = split.read()
    assert (found["forward"], found["other"]) == (5.0, 7.0)


def test_old_marks_are_added_up(clock: Clock) -> None:
    split = TimeSplit(torch.device("cpu"))
    for _ in range(3 * time_split.FOLD_AFTER):
        a_step(split, clock)
        assert len(split._marks) <= time_split.FOLD_AFTER + 1
    assert split.read()["reduce"] == 300.0 * time_split.FOLD_AFTER
    for _ in range(time_split.FOLD_AFTER):
        a_step(split, clock)
    split.restart()
    assert set(split.read().values()) == {0.0}


def test_on_a_gpu_events_tell_milliseconds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None  # the device is not there yet

        def record(self) -> None:
            self.recorded = clock.now

        def synchronize(self) -> None:
            self.at = self.recorded

        def elapsed_time(self, end: Event) -> float:
            assert end.at is not None
            return 1000 * (end.at - self.recorded)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    split = TimeSplit(torch.device("cuda"))
    a_step(split, clock)
    assert split.read() == {**dict.fromkeys(PARTS, 0.0), "other": 1.0, "backward": 1010.0, "reduce": 100.0}


def parts_of_steps(raw: dict[str, Any]) -> dict[str, float]:
    """Seconds of two steps by a clock that only what is named here moves: on every rank, by that rank."""
    import deepspeed.runtime.engine as of_deepspeed
    from deepspeed.runtime.pipe import p2p

    from nextlat_dist.model.decoder_layer import DecoderLayer
    from nextlat_dist.objective.terms import term_counts, term_weights
    from tests.kit.training.runs import start

    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:

        def moves(owner: Any, name: str, seconds: float) -> None:
            original = getattr(owner, name)

            def slow(*arguments: Any, **named: Any) -> Any:
                clock.now += seconds
                return original(*arguments, **named)

            patch.setattr(owner, name, slow)

        patch.setattr(time_split, "time", SimpleNamespace(perf_counter=clock))
        moves(DecoderLayer, "forward", 1)
        moves(torch.autograd, "backward", 100)
        moves(of_deepspeed.DeepSpeedEngine, "buffered_allreduce_fallback", 10_000)
        moves(torch.optim.AdamW, "step", 1e6)
        moves(p2p, "send", 1e-3)
        config, _, engine = start(raw)
        batches = jobs.ragged_rows(8, seed=1).split(4)
        weights = term_weights(term_counts(jobs.ragged_rows(8, seed=1), config.objective), config.objective)
        for _ in range(2):
            engine.train_step(batches, weights, None, lambda: setattr(clock, "now", clock.now + 1e8))
        return {name: seconds for name, seconds in engine.time_split.read().items() if seconds}


def test_the_engine_names_its_parts(one_rank: Ranks) -> None:
    """Two steps of two micro-batches."""
    raw = jobs.tiny_config()
    (found,) = one_rank.run(parts_of_steps, raw)
    assert found == {"forward": 16, "backward": 400, "reduce": 20_000, "step": 2e6, "other": 2e8}


def test_a_pipeline_names_its_parts(two_ranks: Ranks) -> None:
    raw = jobs.tiny_config(parallel={"pipeline_model_parallel_size": 2})
    for found in two_ranks.run(parts_of_steps, raw):
        assert 4 <= found.pop("forward") <= 12  # one layer, or three
        assert found.pop("pipeline") > 0
        assert found == {"backward": 400, "reduce": 20_000, "step": 2e6, "other": 2e8}
