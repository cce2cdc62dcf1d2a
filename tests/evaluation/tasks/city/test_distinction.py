"""Distinction by hand on a 3 x 3 city.

0 1 2
3 4 5   all streets two-way
6 7 8
"""

from __future__ import annotations

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks.city.distinction import Apart, distinction, histories_apart, telling_suffixes
from nextlat_dist.tasks import EOS_ID, vocab_size
from nextlat_dist.tasks.city import PROMPT_TOKENS, City, turn_id
from tests.kit.city_walkers import FunctionWalker, true_walker

SQUARE = City(rows=3, columns=3, one_way=0, closed=0, wander=0.8, max_turns=8, test_share=0.25)
N, E, S, W = (turn_id(turn) for turn in range(4))
# To 8. After east the first stands at 1, after south the second at 3.
PAIR = Apart([*SQUARE.prompt(0, 8), E], [*SQUARE.prompt(0, 8), S], 1, 3, 8, 1)


def test_telling_suffixes_by_hand() -> None:
    # At 1: east, south, west. At 3: north, east, south. West alone tells.
    # East: 2 (south, west) against 4 (all): nothing. South: 4 (all) against 6 (north, east): south, west tell.
    # East south: 5 (north, south, west) against 7 (north, east, west): south tells.
    # East west: 1 (east, south, west) against 3 (north, east, south): west tells.
    # South north: 1 against 3: west. South east: 5 against 7: south.
    telling = {(W,), (S, S), (S, W), (E, S, S), (E, W, W), (S, N, W), (S, E, S)}
    assert set(telling_suffixes(SQUARE, PAIR)) == telling


def test_near_the_last_turn_only_what_arrives_is_possible() -> None:
    late = Apart(PAIR.first, PAIR.second, 5, 7, 8, 6)  # two turns left: one to 8 and nothing else
    assert set(telling_suffixes(SQUARE, late)) == {(S,)}


def test_without_wandering_only_the_preferred_turn_is_possible() -> None:
    city = City(**{**SQUARE.parameters, "wander": 0.0})
    assert set(telling_suffixes(city, PAIR)) == {(E, S)}  # 1, 2, 5, 8 against 3, 4, 5, 8


def test_arriving_tells() -> None:
    pair = Apart([*SQUARE.prompt(0, 2), E], [*SQUARE.prompt(0, 2), S], 1, 3, 2, 1)
    # As above, but east leads the first to its drop-off: there it stops, and the second may not.
    found = set(telling_suffixes(SQUARE, pair))
    assert (E, EOS_ID) in found
    assert not any(suffix[0] == E and suffix != (E, EOS_ID) for suffix in found)


def test_who_knows_the_city_tells_all_and_only_what_is_so() -> None:
    assert distinction(true_walker(SQUARE), SQUARE, [PAIR]) == (1.0, 1.0)


def test_who_always_says_the_same_tells_nothing() -> None:
    p = np.zeros(vocab_size(SQUARE))
    p[[N, E, S, W]] = 0.25
    assert distinction(FunctionWalker(lambda history: p), SQUARE, [PAIR]) == (0.0, 1.0)


def test_recall_and_precision_by_hand() -> None:
    # Knows the first turn's streets only: after east (at 1) no north, after south (at 3) no west; then anything goes.
    def expect(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        p[[N, E, S, W]] = 0.25
        if len(history) == PROMPT_TOKENS + 1:
            p[W if history[-1] == S else N] = 0.005  # below the threshold
        return p

    recall, precision = distinction(FunctionWalker(expect), SQUARE, [PAIR])
    assert recall == pytest.approx(1 / 7)  # (west) of the seven telling suffixes
    assert precision == 1  # (west) is its only one

    def wrong_way_round(history: list[int]) -> np.ndarray:
        p = expect(history)
        if len(history) == PROMPT_TOKENS + 1:
            p[[N, E, S, W]] = (0.25, 0.25, 0.005, 0.25) if history[-1] == S else (0.25, 0.25, 0.25, 0.005)
        return p

    # After east north, east, south; after south north, east, west: (south) tells it, but is possible at 3.
    # So do the city's four suffixes that begin with south.
    assert distinction(FunctionWalker(wrong_way_round), SQUARE, [PAIR]) == (pytest.approx(4 / 7), 0)


def test_pairs_are_different_places_of_one_drop_off() -> None:
    rng = np.random.default_rng(0)
    walks = [SQUARE.sample(rng, "train") for _ in range(100)]
    pairs = histories_apart(SQUARE, walks, 40, rng)
    assert len(pairs) == 40
    assert len({pair.drop_off for pair in pairs}) > 5
    for pair in pairs:
        assert pair.first_place != pair.second_place
        for history, place in ((pair.first, pair.first_place), (pair.second, pair.second_place)):
            pickup, drop_off = SQUARE.problem(history)
            trip = SQUARE.follow(pickup, drop_off, history[PROMPT_TOKENS:])
            assert (trip.places[-1], drop_off, len(trip.turns)) == (place, pair.drop_off, pair.turns)
            assert place != drop_off
    recall, precision = distinction(true_walker(SQUARE), SQUARE, pairs[:10])
    assert (recall, precision) == (1, 1)
