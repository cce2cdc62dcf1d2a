"""The city: its streets, its walks and their distribution, and trips judged token by token."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.tasks import EOS_ID, Split, make_task, vocab_size, words_of
from nextlat_dist.tasks.city import NO_STREET, City, Trip, grid, place_id, turn_id

NORTH, EAST, SOUTH, WEST = range(4)
# 0 1 2
# 3 4 5   all streets two-way
# 6 7 8
SQUARE = City(rows=3, columns=3, one_way=0, closed=0, max_turns=8, test_share=0.25)


def test_streets_lead_to_neighbours() -> None:
    assert SQUARE.streets[0].tolist() == [NO_STREET, 1, 3, NO_STREET]
    assert SQUARE.streets[4].tolist() == [1, 5, 7, 3]
    assert SQUARE.streets[5].tolist() == [2, NO_STREET, 8, 4]


@pytest.mark.parametrize("seed", range(5))
def test_as_many_streets_are_closed_and_one_way_as_asked_and_everything_is_within_reach(seed: int) -> None:
    city = City(rows=5, columns=7, one_way=0.35, closed=0.2, map_seed=seed)
    full = grid(5, 7)
    kept = city.streets != NO_STREET
    assert (city.streets[kept] == full[kept]).all()
    sides: dict[frozenset[int], int] = {
        frozenset((place, int(full[place, turn]))): 0 for place, turn in np.argwhere(full != NO_STREET).tolist()
    }
    for place, turn in np.argwhere(kept).tolist():
        sides[frozenset((place, int(full[place, turn])))] += 1
    assert len(sides) == 5 * 6 + 7 * 4
    assert Counter(sides.values()) == {0: round(0.2 * 58), 1: round(0.35 * 58), 2: 58 - 12 - 20}
    for start in range(city.places):  # a plain search from each place
        assert _distances(city, start) == city.distances[start].tolist()


def _distances(city: City, start: int) -> list[int]:
    found = {start: 0}
    queue = [start]
    for place in queue:
        for onward in city.streets[place].tolist():
            if onward != NO_STREET and onward not in found:
                found[onward] = found[place] + 1
                queue.append(onward)
    return [found[place] for place in range(city.places)]


def test_the_preferred_turn_is_the_first_on_a_shortest_route() -> None:
    assert SQUARE.preferred[6, 2] == NORTH  # east would be as short
    assert SQUARE.preferred[0, 8] == EAST  # south would be as short
    assert SQUARE.preferred[2, 0] == WEST
    assert SQUARE.preferred[1, 7] == SOUTH


def test_the_distribution_of_a_turn_by_hand() -> None:
    city = City(rows=3, columns=3, one_way=0, closed=0, wander=0.6, max_turns=8, test_share=0.25)
    distribution = city.turn_distribution(drop_off=8, turns_left=8)
    assert distribution[8].tolist() == [0, 0, 0, 0]
    assert distribution[0] == pytest.approx([0, 0.3 + 0.4, 0.3, 0])
    assert distribution[4] == pytest.approx([0.15, 0.15 + 0.4, 0.15, 0.15])
    # Three turns left: from 4 the drop-off is two turns away, so no turn may lead away from it; 3 just gets there.
    distribution = city.turn_distribution(drop_off=8, turns_left=3)
    assert distribution[4] == pytest.approx([0, 0.3 + 0.4, 0.3, 0])
    assert distribution[3] == pytest.approx([0, 0.3 + 0.4, 0.3, 0])
    assert distribution[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("wander", [0.0, 0.5, 1.0])
def test_walks_follow_the_distribution(wander: float) -> None:
    city = City(rows=3, columns=3, one_way=0.25, closed=0.0, wander=wander, max_turns=7, test_share=0.5)
    rng = np.random.default_rng(3)
    taken: Counter[tuple[int, int, int, int]] = Counter()
    for _ in range(3_000):
        document = city.sample(rng, "train")
        pickup, drop_off = city.problem(document.tokens.tolist())
        trip = city.follow(pickup, drop_off, document.tokens[3:].tolist())
        assert trip.arrived
        assert drop_off not in trip.places[:-1]
        assert len(trip.turns) <= 7
        for number, (place, turn) in enumerate(zip(trip.places, trip.turns, strict=False)):
            taken[drop_off, 7 - number, place, turn] += 1
    visited: Counter[tuple[int, int, int]] = Counter()
    for (drop_off, left, place, _), count in taken.items():
        visited[drop_off, left, place] += count
    compared = 0
    for (drop_off, left, place), total in visited.items():
        distribution = city.turn_distribution(drop_off, left)[place]
        for turn in range(4):
            count, p = taken[drop_off, left, place, turn], distribution[turn]
            assert abs(count - total * p) <= 5 * np.sqrt(total * p * (1 - p)) + 1e-9 if total * p else count == 0
            compared += p not in (0, 1) and total > 50
    assert compared > 20 or wander == 0


def test_documents_speak_of_pickup_drop_off_turns_and_end() -> None:
    document = City(wander=0, map_seed=4).sample(np.random.default_rng(0), "test")
    city = make_task("city", City(wander=0, map_seed=4).parameters)
    words = words_of(city, document.tokens)
    assert words[0] == "<s>"
    assert words[-1] == "</s>"
    assert document.prompt_tokens == 3
    assert all(word.startswith("r") for word in words[1:3])
    assert set(words[3:-1]) <= {"north", "east", "south", "west"}
    assert isinstance(city, City)
    pickup, drop_off = city.problem(document.tokens.tolist())
    assert document.content == f"{pickup} {drop_off}".encode()
    assert words[1:3] == [f"r{place // 10}c{place % 10}" for place in (pickup, drop_off)]
    assert len(words) - 4 == city.distances[pickup, drop_off]  # without wandering, the shortest route
    assert vocab_size(city) == 4 + 4 + 100
    assert len(set(city.symbols)) == 104


def test_a_pair_is_of_one_split_and_all_pairs_are_there() -> None:
    splits = {split: set(map(tuple, SQUARE.pairs(split).tolist())) for split in get_args(Split)}
    assert splits["train"].isdisjoint(splits["test"])
    assert splits["train"] | splits["test"] == {(a, b) for a in range(9) for b in range(9) if a != b}
    assert len(splits["test"]) == 18
    rng = np.random.default_rng(0)
    for split, pairs in splits.items():
        drawn = {SQUARE.problem(SQUARE.sample(rng, split).tokens.tolist()) for _ in range(1000)}
        assert drawn == pairs
    other = City(**{**SQUARE.parameters, "map_seed": 1})
    assert set(map(tuple, other.pairs("test").tolist())) != splits["test"]


def test_the_same_seed_gives_the_same_walks() -> None:
    first, second = (
        [City(map_seed=5).sample(np.random.default_rng(seed), "train").tokens.tolist() for seed in range(5)]
        for _ in range(2)
    )
    assert first == second
    assert (City(map_seed=5).streets == City(map_seed=5).streets).all()
    assert (City(map_seed=5).streets != City(map_seed=6).streets).any()


def test_trips_by_hand() -> None:
    def follow(*turns: int) -> Trip:
        return SQUARE.follow(0, 5, turns)

    east, south, north = turn_id(EAST), turn_id(SOUTH), turn_id(NORTH)
    assert follow(east, east, south, EOS_ID) == Trip((0, 1, 2, 5), (EAST, EAST, SOUTH), None, True)
    assert follow(east, east, south) == Trip((0, 1, 2, 5), (EAST, EAST, SOUTH), None, False)  # does not stop
    assert follow(east, EOS_ID) == Trip((0, 1), (EAST,), EOS_ID, False)  # stops elsewhere
    assert follow(east, north, south) == Trip((0, 1), (EAST,), north, False)  # no street
    assert follow(south, east, east, south) == Trip((0, 3, 4, 5), (SOUTH, EAST, EAST), south, False)  # drives on
    assert follow(place_id(1)) == Trip((0,), (), place_id(1), False)  # no turn
    assert follow(EOS_ID) == Trip((0,), (), EOS_ID, False)
    assert follow(east, east, south, EOS_ID, north).arrived  # nothing is read after EOS


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": 1}, "city with --rows 1 is no task; it must be at least 2"),
        ({"one_way": 1.5}, "one_way is 1.5, but is a share from 0 to 1; change --one-way"),
        ({"max_turns": 3}, "max_turns is 3, but some trips of this city need 4 turns; raise --max-turns"),
        ({"test_share": 0.0}, "test_share is 0.0, which leaves a split without"),
        ({"closed": 0.9}, "closed asks for 11 of 12 streets, but only 4 can be while every intersection stays within"),
    ],
)
def test_what_makes_no_city_is_said(change: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match="^" + sentence.replace("(", r"\(")):
        City(**{**SQUARE.parameters, **change})
