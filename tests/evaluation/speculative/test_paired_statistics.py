"""Medians over trials, their intervals, and choosing the best of several without hindsight."""

from __future__ import annotations

import numpy as np
import pytest

from nextlat_dist.evaluation.speculative.paired_statistics import best_of, estimate


def test_an_estimate_is_the_median_with_its_interval() -> None:
    assert estimate(np.array([2.0, 2.0, 2.0])).named("speed") == {"speed": 2.0, "speed_low": 2.0, "speed_high": 2.0}
    values = np.array([1.0, 2.0, 3.0, 4.0, 1000.0])
    found = estimate(values)
    assert found.value == 3.0
    assert 1.0 <= found.low < 3.0 < found.high <= 1000.0


def test_the_interval_covers_the_median() -> None:
    """Of 300 samples with true median 1, about 95% of the intervals hold it."""
    numbers = np.random.default_rng(5)
    found = [estimate(np.exp(numbers.normal(0, 0.1, 24))) for _ in range(300)]
    covered = sum(e.low <= 1 <= e.high for e in found)
    assert 270 <= covered <= 298


def test_each_half_is_measured_with_the_choice_of_the_other() -> None:
    halves = np.array([0, 0, 1, 1])
    rates = {1: np.array([30.0, 30.0, 20.0, 20.0]), 2: np.array([12.0, 12.0, 40.0, 40.0])}
    best = best_of(rates, np.full(4, 10.0), halves)
    assert best.rates.tolist() == [12.0, 12.0, 20.0, 20.0]
    assert best.held_out == (2, 2, 1, 1)
    assert best.choice == 2  # medians of the ratios over all trials: 2.5 and 2.6
    assert best.in_sample.tolist() == rates[2].tolist()


def test_the_choice_is_by_the_ratio_within_a_trial() -> None:
    """Choice 2 has the higher median rate, though it is the slower one in most trials."""
    baseline = np.array([1.0, 10.0, 10.0, 100.0, 100.0])
    rates = {1: baseline * 2.0, 2: np.array([1.0, 10.0, 25.0, 150.0, 150.0])}
    assert best_of(rates, baseline, np.array([0, 1, 0, 1, 0])).choice == 1


def test_luck_is_not_reported_as_speed() -> None:
    """Ten equal choices, all noise: with hindsight the best one looks fast, cross-fitted it does not."""
    numbers = np.random.default_rng(7)
    halves = np.arange(12) % 2
    crossed, hindsight = [], []
    for _ in range(200):
        baseline = np.ones(12)
        best = best_of({k: np.exp(numbers.normal(0, 0.1, 12)) for k in range(1, 11)}, baseline, halves)
        crossed.append(np.median(best.rates))
        hindsight.append(np.median(best.in_sample))
    assert np.mean(hindsight) > 1.03
    assert np.mean(crossed) == pytest.approx(1.0, abs=0.01)
