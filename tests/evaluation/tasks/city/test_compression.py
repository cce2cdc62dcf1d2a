"""Sampled compression of walkers for which it is known."""

from __future__ import annotations

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks.city import compression
from nextlat_dist.evaluation.tasks.city.compression import CONTINUATIONS, sampled_compression
from nextlat_dist.evaluation.tasks.city.histories import HistorySampler, Situation
from nextlat_dist.evaluation.tasks.city.scores import continue_situations
from nextlat_dist.tasks import EOS_ID, vocab_size
from nextlat_dist.tasks.city import PROMPT_TOKENS, City, turn_id
from tests.kit.city_walkers import FunctionWalker, reciting_walker, true_walker

CITY = City(rows=3, columns=3)


def situations(count: int) -> list[Situation]:
    rng = np.random.default_rng(0)
    documents = [CITY.sample(rng, "test") for _ in range(4 * count)]
    return list(HistorySampler(CITY, documents).situations(count, rng))


def test_who_knows_the_city_accepts_all_that_it_writes() -> None:
    found = situations(12)
    mean, every = sampled_compression(true_walker(CITY), CITY, found, seed=1)
    assert mean == 1.0
    assert (every.right, every.total) == (len(found), len(found))


def test_who_recites_accepts_what_it_recites_after_both() -> None:
    """Nothing is drawn then: all continuations of a trial are one, and accepted where the greedy ones are equal."""
    found = situations(40)
    walker = reciting_walker(CITY)
    equal = [first == second for first, second in continue_situations(walker, CITY, found)]
    assert 0 < sum(equal) < len(equal)
    mean, every = sampled_compression(walker, CITY, found, seed=1)
    assert mean == pytest.approx(sum(equal) / len(equal))
    assert every.right == sum(equal)


@pytest.mark.parametrize(("after_second", "accepted"), [(0.0101, 1.0), (0.0099, 0.0)])
def test_a_token_must_have_more_than_a_hundredth(after_second: float, accepted: float) -> None:
    """By hand: after the first history the walker goes east, after the second with this probability."""
    east, south = turn_id(1), turn_id(2)
    first, second = [*CITY.prompt(0, 8), east], [*CITY.prompt(0, 8), south]

    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(CITY))
        if len(history) == PROMPT_TOKENS:
            return p + 1 / len(p)
        likely = 1.0 if history[PROMPT_TOKENS] == east else after_second
        p[EOS_ID], p[south] = (likely, 1 - likely) if len(history) == PROMPT_TOKENS + 1 else (0.0, 1.0)
        return p

    pair = Situation(first, second, place=4, drop_off=8, turns=1)
    mean, every = sampled_compression(FunctionWalker(expect), CITY, [pair], seed=0)
    assert (mean, every.right) == (accepted, int(accepted))


def test_so_many_trials_and_continuations_as_in_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (CONTINUATIONS, compression.TRIALS, compression.EPSILON) == (30, 100, 0.01)
    monkeypatch.setattr(compression, "TRIALS", 3)
    assert sampled_compression(true_walker(CITY), CITY, situations(5), seed=0)[1].total == 3
