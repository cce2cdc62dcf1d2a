"""Time counts for the innermost part, once, however many marks there are."""

from __future__ import annotations

import contextlib

import pytest
import torch

from nextlat_dist.training.engine import time_split
from nextlat_dist.training.engine.time_split import PARTS, TimeSplit


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
