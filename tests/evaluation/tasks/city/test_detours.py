"""Detours counted by hand on a 3 x 3 city.

0 1 2
3 4 5   all streets two-way
6 7 8
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks.city.detours import drive_with_detours
from nextlat_dist.tasks import EOS_ID, vocab_size
from nextlat_dist.tasks.city import PROMPT_TOKENS, City, turn_id
from tests.kit.city_walkers import FunctionWalker, reciting_walker, true_walker

SQUARE = City(rows=3, columns=3, one_way=0, closed=0, max_turns=8, test_share=0.25)
N, E, S, W = (turn_id(turn) for turn in range(4))


class Recorded(FunctionWalker):
    """Keeps every history it was asked to continue."""

    def __init__(self, expect: Callable[[list[int]], np.ndarray]) -> None:
        super().__init__(expect)
        self.asked: list[list[int]] = []

    def continuations(self, histories, max_new_tokens, temperature, seed):  # type: ignore[no-untyped-def]
        self.asked += [list(history) for history in histories]
        return super().continuations(histories, max_new_tokens, temperature, seed)


@pytest.mark.parametrize("kind", ["random", "least_likely"])
def test_without_detours_the_model_drives_alone(kind: str) -> None:
    problems = [(0, 8), (2, 6), (4, 5)]
    arrived, detours = drive_with_detours(
        reciting_walker(SQUARE), SQUARE, problems, 0.0, kind, np.random.default_rng(0)
    )
    assert (arrived.right, arrived.total, detours) == (3, 3, 0)


def test_forced_detours_by_hand() -> None:
    city = City(**{**SQUARE.parameters, "max_turns": 4})
    walker = Recorded(true_walker(city).expect)
    arrived, detours = drive_with_detours(walker, city, [(0, 1)], 1.0, "random", np.random.default_rng(0))
    # At 0, 4 turns left: the model's turn is east, the only other way is south, to 3 (2 away, 3 left).
    # At 3, 3 left: the model's is north; east to 4 (1 away, 2 left) is possible, south to 6 (3 away) too far.
    # At 4, 2 left: the model's is north; every other way leads 2 away. So it drives to 1, and stops.
    prompt = city.prompt(0, 1)
    assert walker.asked == [prompt, [*prompt, S], [*prompt, S, E], [*prompt, S, E, N]]
    assert (arrived.right, arrived.total, detours) == (1, 1, 2)


def test_a_recited_route_arrives_exactly_where_no_detour_came() -> None:
    # From 0 to 2: east, east. A detour before either turn (there is always another way) leaves it stopping elsewhere:
    # after south and east at 4, after east and west at 0, after east and south at 4. (Three more detours could bring it
    # to 2 by luck; of these trips, none.)
    rng = np.random.default_rng(6)
    arrived, detours = drive_with_detours(reciting_walker(SQUARE), SQUARE, [(0, 2)] * 400, 0.1, "random", rng)
    replaced = np.random.default_rng(6).random((400, SQUARE.max_turns)) < 0.1
    spared = ~replaced[:, :2].any(axis=1)
    assert 250 < spared.sum() < 375
    assert arrived.right == spared.sum()
    assert 0.1 < detours < 0.5


def test_the_least_likely_way_is_taken() -> None:
    # At 4, on the way to 5, the model wants east and holds west least likely.
    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        north, south = (0.3, 0.15) if len(history) != PROMPT_TOKENS + 1 else (0.15, 0.3)
        p[[E, N, S, W, EOS_ID]] = 0.5, north, south, 0.04, 0.01
        return p

    walker = Recorded(expect)
    arrived, detours = drive_with_detours(walker, SQUARE, [(4, 5)], 1.0, "least_likely", np.random.default_rng(0))
    prompt = SQUARE.prompt(4, 5)
    # West to 3, where there is no street west and the model now holds north least likely; at 0, only south is another
    # way than east.
    assert walker.asked[:4] == [prompt, [*prompt, W], [*prompt, W, N], [*prompt, W, N, S]]
    assert arrived.right == 0  # it never stops
    assert detours >= 3


def test_random_detours_take_every_other_way() -> None:
    walker = Recorded(true_walker(SQUARE).expect)
    drive_with_detours(walker, SQUARE, [(4, 5)] * 200, 1.0, "random", np.random.default_rng(0))
    first = [history[PROMPT_TOKENS] for history in walker.asked if len(history) == PROMPT_TOKENS + 1]
    counts = [first.count(turn) for turn in (N, E, S, W)]
    assert counts[1] == 0  # its own turn
    assert min(counts[0], counts[2], counts[3]) > 40
    assert sum(counts) == 200


@pytest.mark.parametrize(
    ("answer", "arrives"),
    [
        ([E, E, EOS_ID], True),
        ([E, E, E], False),  # no street, and it should stop
        ([E, EOS_ID], False),  # stops too early
        ([E, N], False),  # no street
        ([E, W] * 4 + [E, E], False),  # more turns than a walk may have
        ([E, W, E, W, E, W, E, E, EOS_ID], True),  # as many as it may have
    ],
)
def test_illegal_tokens_and_endless_trips_do_not_arrive(answer: list[int], arrives: bool) -> None:
    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        p[answer[min(len(history) - PROMPT_TOKENS, len(answer) - 1)]] = 1
        return p

    arrived, _ = drive_with_detours(FunctionWalker(expect), SQUARE, [(0, 2)], 0.0, "random", np.random.default_rng(0))
    assert arrived.right == arrives


def test_who_knows_the_city_always_arrives() -> None:
    city = City(rows=4, columns=5, one_way=0.3, closed=0.1, wander=0.4, max_turns=16, map_seed=1)
    problems = [tuple(pair) for pair in city.pairs("test").tolist()[::2]]
    for kind in ("random", "least_likely"):
        for probability in (0.2, 1.0):
            rng = np.random.default_rng(0)
            arrived, detours = drive_with_detours(true_walker(city), city, problems, probability, kind, rng)
            assert arrived.right == arrived.total == len(problems)
            assert detours > 0.3
