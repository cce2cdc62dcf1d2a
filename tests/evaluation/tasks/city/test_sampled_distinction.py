"""Distinction by sampled suffixes, of walkers for which it is known; the square is that of test_distinction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks.city import sampled_distinction as module
from nextlat_dist.evaluation.tasks.city.distinction import Apart, histories_apart
from nextlat_dist.evaluation.tasks.city.sampled_distinction import sampled_distinction
from nextlat_dist.tasks import EOS_ID, vocab_size
from nextlat_dist.tasks.city import PROMPT_TOKENS, City, turn_id
from tests.kit.city_walkers import FunctionWalker, true_walker

SQUARE = City(rows=3, columns=3, one_way=0, closed=0, wander=0.8, max_turns=8, test_share=0.25)
N, E, S, W = (turn_id(turn) for turn in range(4))
PAIR = Apart([*SQUARE.prompt(0, 8), E], [*SQUARE.prompt(0, 8), S], 1, 3, 8, 1)  # at 1 and at 3


def test_the_citys_walks_end_at_the_drop_off_and_tell_at_the_first_impossible_token() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        walk = module._walk(SQUARE, PAIR, rng)
        assert walk[-1] == EOS_ID
        assert len(walk) <= SQUARE.max_turns + 1 - PAIR.turns
        trip = SQUARE.follow(1, 8, list(walk))
        assert trip.arrived
    # West is possible at 1 alone; so is, after south, south at 4 and not at 6. East leads to 2 and 4: west is at both.
    assert module._telling(SQUARE, PAIR, (W, E, E, S, S, EOS_ID)) == (W,)
    assert module._telling(SQUARE, PAIR, (S, S, E, EOS_ID)) == (S, S)
    assert module._telling(SQUARE, PAIR, (E, W)) is None


def test_who_knows_the_city_tells_all_and_only_what_is_so() -> None:
    # Its rarest turn has 0.8 / 4, far above the threshold.
    rng = np.random.default_rng(0)
    pairs = histories_apart(SQUARE, [SQUARE.sample(rng, "train") for _ in range(60)], 10, rng)
    assert sampled_distinction(true_walker(SQUARE), SQUARE, [PAIR, *pairs], seed=1) == (1.0, 1.0)


def test_who_always_says_the_same_tells_nothing() -> None:
    p = np.zeros(vocab_size(SQUARE))
    p[[N, E, S, W]] = 0.25
    assert sampled_distinction(FunctionWalker(lambda history: p), SQUARE, [PAIR], seed=1) == (0.0, 1.0)


def test_a_wrong_difference_costs_precision() -> None:
    """After south the walker believes that there is no south, which at 3 there is; all else it says is the same."""

    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        p[[N, E, S, W]] = 0.25
        if len(history) == PROMPT_TOKENS + 1 and history[-1] == S:
            p[[N, E, S, W]] = (0.33, 0.33, 0.01, 0.33)
        return p

    recall, precision = sampled_distinction(FunctionWalker(expect), SQUARE, [PAIR], seed=1)
    assert precision == 0.0
    # Of the city's telling walks it tells those that begin with south.
    rng = np.random.default_rng([1, 5])
    walks = [module._telling(SQUARE, PAIR, module._walk(SQUARE, PAIR, rng)) for _ in range(module.CONTINUATIONS)]
    told = [walk for walk in walks if walk is not None]
    assert recall == pytest.approx(np.mean([walk[0] == S for walk in told]))
    assert 0 < recall < 1


class Writer(FunctionWalker):
    """Always writes the same, however unlikely it finds that."""

    def __init__(self, suffix: list[int], expect: Callable[[list[int]], np.ndarray]) -> None:
        super().__init__(expect)
        self.suffix = suffix

    def continuations(
        self, histories: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        return [self.suffix for _ in histories]


def test_a_suffix_ends_where_it_is_not_accepted() -> None:
    """South is possible at 1 and at 3, south south at 1 alone: who stumbles over the first south tells nothing true."""

    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        p[[N, E, S, W, EOS_ID]] = 0.2
        if history[PROMPT_TOKENS:] == [S]:  # the second history
            p[[S, N]] = (0.0, 0.4)
        return p

    assert sampled_distinction(Writer([S, S, E, EOS_ID], expect), SQUARE, [PAIR], seed=1)[1] == 0.0


@pytest.mark.parametrize(("after_first", "told"), [(0.02, 1.0), (0.005, 0.0)])
def test_a_suffix_must_be_accepted_after_the_first_history(after_first: float, told: float) -> None:
    """West is possible at 1 alone. The walker never expects it at 3, and at 1 with this probability."""

    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        west = 0.0 if history[PROMPT_TOKENS : PROMPT_TOKENS + 1] == [S] else after_first
        p[[N, E, S, W]] = (0.3, 0.3, 0.4 - west, west)
        return p

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_walk", lambda city, pair, rng: (W, E, E, S, S, EOS_ID))
        recall, precision = sampled_distinction(Writer([W, E, EOS_ID], expect), SQUARE, [PAIR], seed=1)
    assert recall == told
    assert precision == 1.0, "right, or nothing told"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tells", lambda city, pair, suffix: False)
        assert sampled_distinction(Writer([W, E, EOS_ID], expect), SQUARE, [PAIR], seed=1)[1] == 1.0 - told


def test_each_pair_counts_once() -> None:
    other = Apart(PAIR.second, PAIR.first, 3, 1, 8, 1)
    found = [(PAIR, True), (PAIR, False), (other, True)]
    assert module._mean_over_pairs(found) == 0.75
    assert module._mean_over_pairs([]) == 1.0
