"""Different ways to the same situation: histories of one length that end at one intersection with one drop-off.

Invariant: a drawn history has the distribution of the city's walks, given its start, its end and its length: nothing
tells it from one of the data. What the rest of a walk depends on (intersection, drop-off, turns left) is the same for
all of them, so a model that knows the city continues all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nextlat_dist.tasks import Document
from nextlat_dist.tasks.city import NO_STREET, PROMPT_TOKENS, City, turn_id

TRIES = 20  # draws of another history before a situation is given up: it may have a single one


@dataclass(frozen=True)
class Situation:
    """Two different histories that say the same: at `place`, on the way to `drop_off`, after `turns` turns."""

    first: list[int]
    second: list[int]
    place: int
    drop_off: int
    turns: int


class HistorySampler:
    """Histories whose (pickup, drop-off) pairs are among those of `documents`, each pair as likely."""

    def __init__(self, city: City, documents: Sequence[Document]) -> None:
        self._city = city
        self._documents = documents
        self._starts = np.zeros((city.places, city.places))  # [drop-off, pickup]
        for pickup, drop_off in {city.problem(document.tokens.tolist()) for document in documents}:
            self._starts[drop_off, pickup] = 1

    def situations(self, count: int, rng: np.random.Generator) -> Iterator[Situation]:
        """Up to `count`, one per document: its own history up to a random turn before its end, and another one."""
        city = self._city
        for document in self._documents:
            tokens = document.tokens.tolist()
            pickup, drop_off = city.problem(tokens)
            trip = city.follow(pickup, drop_off, tokens[PROMPT_TOKENS:])
            if count == 0:
                return
            if len(trip.turns) < 2:
                continue
            turns = int(rng.integers(1, len(trip.turns)))
            first = tokens[: PROMPT_TOKENS + turns]
            drawn = self.draw(drop_off, trip.places[turns], turns, TRIES, rng)
            second = next((history for history in drawn if history != first), None)
            if second is not None:
                count -= 1
                yield Situation(first, second, trip.places[turns], drop_off, turns)

    def draw(self, drop_off: int, place: int, turns: int, count: int, rng: np.random.Generator) -> Iterator[list[int]]:
        """`count` independent histories to `drop_off` that stand at `place` after `turns` turns (there must be one)."""
        city = self._city
        streets = city.streets
        flows = []  # [places, 4] by turn: how likely the walk is there and turns so
        here = self._starts[drop_off]
        for number in range(turns):
            flows.append(here[:, None] * city.turn_distribution(drop_off, city.max_turns - number))
            here = np.zeros(city.places)
            there = streets != NO_STREET
            np.add.at(here, streets[there], flows[-1][there])
        assert here[place] > 0, "no walk gets there"
        for _ in range(count):
            taken: list[int] = []
            current = place
            for flow in reversed(flows):
                into = np.flatnonzero(streets == current)
                reached = flow.ravel()[into].cumsum()
                chosen = into[np.searchsorted(reached, rng.random() * reached[-1], side="right")]
                current, turn = divmod(int(chosen), streets.shape[1])
                taken.append(turn_id(turn))
            yield [*city.prompt(current, drop_off), *reversed(taken)]
