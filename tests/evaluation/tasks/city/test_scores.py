"""The city's scores against cases counted by hand, on a 3 x 3 city, and against walkers whose scores are known.

0 1 2
3 4 5   all streets two-way
6 7 8
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks.city.histories import HistorySampler, Situation
from nextlat_dist.evaluation.tasks.city.map import map_figure
from nextlat_dist.evaluation.tasks.city.scores import (
    CityScores,
    continue_situations,
    driven_streets,
    score_city,
    score_reading,
    street_numbers,
    write_trips,
)
from nextlat_dist.evaluation.tasks.scores import Share
from nextlat_dist.reporting.pictures import save_picture
from nextlat_dist.tasks import EOS_ID, Document, vocab_size
from nextlat_dist.tasks.city import PROMPT_TOKENS, City, Trip, turn_id
from tests.kit.city_walkers import FunctionWalker, reciting_walker, true_walker

SQUARE = City(rows=3, columns=3, one_way=0, closed=0, max_turns=8, test_share=0.25)
N, E, S, W = (turn_id(turn) for turn in range(4))


def document(pickup: int, drop_off: int, *turns: int) -> Document:
    return Document(np.array([*SQUARE.prompt(pickup, drop_off), *turns, EOS_ID]), PROMPT_TOKENS, b"")


def always(*weights: tuple[int, float]) -> FunctionWalker:
    """Expects the same whatever was read."""
    p = np.zeros(vocab_size(SQUARE))
    for token, weight in weights:
        p[token] = weight
    return FunctionWalker(lambda history: p)


def test_reading_by_hand() -> None:
    # Intersections of the walks: 0 1 2 5 and 8 7. East is a street at 0, 1, 7; there is none at 2, at 8.
    walks = [document(0, 5, E, E, S), document(8, 7, W)]
    scores = CityScores()
    score_reading(always((E, 0.6), (S, 0.3), (EOS_ID, 0.1)), SQUARE, walks, scores)
    assert scores.numbers["legal_turns_teacher_forced"] == pytest.approx(2 / 4)  # 0, 1 of 0, 1, 2, 8
    assert scores.numbers["stops_teacher_forced"] == Share(0, 2)
    # 0, 1: east and south are streets; 2: south; at the drop-offs 5 and 7 EOS; 8: neither.
    probability = np.mean([0.9, 0.9, 0.3, 0.1, 0.0, 0.1])
    assert scores.numbers["legal_probability_teacher_forced"] == pytest.approx(probability)
    assert scores.guesses["legal_turns_teacher_forced"] == pytest.approx((2 + 3 + 2 + 2) / 4 / 4)
    assert scores.curves["legal_teacher_forced"].shares == (Share(1, 2), Share(1, 1), Share(0, 1))
    score_reading(always((EOS_ID, 1.0)), SQUARE, walks, scores)
    assert scores.numbers["legal_turns_teacher_forced"] == 0  # it stops everywhere
    assert scores.numbers["stops_teacher_forced"] == Share(2, 2)


def test_valid_trips_by_hand() -> None:
    def east_then_stop(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        p[E if len(history) < PROMPT_TOKENS + 2 else EOS_ID] = 1
        return p

    problems = [(0, 2), (3, 5), (0, 1), (1, 2), (6, 5)]
    trips = write_trips(FunctionWalker(east_then_stop), SQUARE, problems, temperature=0, seed=0)
    # To 2 and to 5: there in two. To 1: drives past it. From 1 to 2: past the edge. To 5 from 6: stops at 8.
    assert [trip.arrived for trip in trips] == [True, True, False, False, False]
    endless = write_trips(always((E, 0.4), (W, 0.6)), SQUARE, [(1, 8)], temperature=0, seed=0)
    assert endless == [Trip((1, 0), (3,), W, False)]


def compressed(walker: FunctionWalker, situations: list[Situation]) -> list[bool]:
    return [first == second for first, second in continue_situations(walker, SQUARE, situations)]


def test_compression_by_hand() -> None:
    # Both histories stand at 4 on the way to 8, after two turns.
    def situation(first: tuple[int, ...], second: tuple[int, ...]) -> Situation:
        return Situation([*SQUARE.prompt(0, 8), *first], [*SQUARE.prompt(*second[:2]), *second[2:]], 4, 8, 2)

    one = situation((E, S), (0, 8, S, E))  # other turns
    two = situation((E, S), (6, 8, N, E))  # another pickup
    assert compressed(true_walker(SQUARE), [one, two]) == [True, True]
    assert continue_situations(true_walker(SQUARE), SQUARE, [one]) == [([E, S, EOS_ID], [E, S, EOS_ID])]

    def by_last_turn(history: list[int]) -> np.ndarray:
        p = np.zeros(vocab_size(SQUARE))
        p[history[-1] if len(history) < PROMPT_TOKENS + 4 else EOS_ID] = 1
        return p

    same = situation((E, S), (2, 8, W, S))
    assert compressed(FunctionWalker(by_last_turn), [one, two, same]) == [False, False, True]


def test_compression_looks_as_far_as_the_walk_may_go() -> None:
    # Six turns taken: two more and EOS are left. The walkers differ in the second of them, or only afterwards.
    def differs_at(place: int) -> FunctionWalker:
        def expect(history: list[int]) -> np.ndarray:
            p = np.zeros(vocab_size(SQUARE))
            p[history[PROMPT_TOKENS] if len(history) == PROMPT_TOKENS + 6 + place else N] = 1
            return p

        return FunctionWalker(expect)

    first, second = ([*SQUARE.prompt(0, 8), *turns] for turns in ([E, W, E, W, E, S], [S, N, S, N, E, S]))
    late = Situation(first, second, 4, 8, 6)
    early = Situation([*SQUARE.prompt(0, 8), E], [*SQUARE.prompt(2, 8), W], 1, 8, 1)
    assert [compressed(differs_at(place), [late, early])[0] for place in (1, 2, 3)] == [
        False,
        False,
        True,
    ]


def test_driven_streets_by_hand() -> None:
    trips = [
        Trip((0, 1, 2), (1, 1), None, True),
        Trip((0, 1), (1,), N, False),  # no street north of 1
        Trip((0, 1), (1,), EOS_ID, False),
        Trip((0, 1), (1,), E, False),  # there is one, but 1 was the drop-off
        Trip((0,), (), W, False),
    ]
    driven = driven_streets(SQUARE, trips)
    expected = np.zeros((9, 4), dtype=int)
    expected[0, 1], expected[1, 1], expected[1, 0], expected[0, 3] = 4, 1, 1, 1
    assert driven.tolist() == expected.tolist()
    numbers = street_numbers(SQUARE, driven)
    assert numbers == {
        "streets_driven": pytest.approx(2 / 24),
        "impossible_streets": 2,
        "impossible_turns": pytest.approx(2 / 7),
    }


def test_histories_follow_the_walk_given_where_they_end() -> None:
    city = City(rows=3, columns=3, one_way=0.25, closed=0, wander=0.7, max_turns=8, test_share=0.5)
    rng = np.random.default_rng(0)
    walks = [city.sample(rng, "test") for _ in range(4_000)]
    drop_off, place, turns = 8, 4, 3
    starts = {pair for pair in map(tuple, city.pairs("test").tolist()) if pair[1] == drop_off}
    seen: dict[tuple[int, ...], int] = {}
    for walk in walks:  # evenly over pairs, as histories are
        pickup, goal = city.problem(walk.tokens.tolist())
        trip = city.follow(pickup, goal, walk.tokens[PROMPT_TOKENS:].tolist())
        if goal == drop_off and len(trip.turns) > turns and trip.places[turns] == place:
            history = tuple(walk.tokens[: PROMPT_TOKENS + turns].tolist())
            seen[history] = seen.get(history, 0) + 1
    total = sum(seen.values())
    drawn: dict[tuple[int, ...], int] = {}
    for history in map(tuple, HistorySampler(city, walks).draw(drop_off, place, turns, 3000, rng)):
        drawn[history] = drawn.get(history, 0) + 1
        assert city.problem(history) in starts
    assert total > 20
    assert len(drawn) > 3
    assert set(seen) <= set(drawn)
    for history, count in drawn.items():
        p = count / 3000
        assert abs(seen.get(history, 0) - total * p) <= 5 * np.sqrt(total * p * (1 - p)) + 1


def test_situations_are_two_ways_to_the_same() -> None:
    rng = np.random.default_rng(0)
    walks = [SQUARE.sample(rng, "test") for _ in range(300)]
    found = list(HistorySampler(SQUARE, walks).situations(100, rng))
    assert len(found) == 100
    lengths = set()
    for situation in found:
        assert situation.first != situation.second
        for history in (situation.first, situation.second):
            pickup, drop_off = SQUARE.problem(history)
            trip = SQUARE.follow(pickup, drop_off, history[PROMPT_TOKENS:])
            assert (trip.places[-1], drop_off, len(trip.turns)) == (
                situation.place,
                situation.drop_off,
                situation.turns,
            )
            assert drop_off not in trip.places
        lengths.add(situation.turns)
    assert {1, 2, 3} <= lengths
    assert len({tuple(situation.second[1:2]) == tuple(situation.first[1:2]) for situation in found}) == 2


def test_who_knows_the_city_passes_and_who_recites_routes_is_found_out(tmp_path: Path) -> None:
    city = City(rows=4, columns=4, one_way=0.3, closed=0.1, max_turns=20, test_share=0.3, map_seed=2)
    rng = np.random.default_rng(0)
    walks = [city.sample(rng, "test") for _ in range(40)]
    knows = score_city(true_walker(city), city, walks)
    shares = {name: n.value if isinstance(n, Share) else n for name, n in knows.numbers.items()}
    assert shares.pop("impossible_streets") == shares.pop("impossible_turns") == 0
    assert 0.5 < shares.pop("streets_driven") <= 1
    assert {name for name, value in shares.items() if value != pytest.approx(1)} == set(), shares
    recites = score_city(reciting_walker(city), city, walks)
    shares = {name: n.value if isinstance(n, Share) else n for name, n in recites.numbers.items()}
    assert shares["valid_greedy"] == 1
    assert shares["compression_greedy"] < 1
    assert shares["valid_from_history_greedy"] < 0.5
    assert shares["legal_turns_teacher_forced"] < 0.8
    assert shares["distinction_recall"] < 0.5
    assert 0.4 < shares["detours_random_0.1"] < 0.95
    assert max(shares["detours_random_0.5"], shares["detours_least_likely_0.5"]) < 0.4
    save_picture(map_figure(city, {"knows": knows.driven, "recites": recites.driven}), tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000
