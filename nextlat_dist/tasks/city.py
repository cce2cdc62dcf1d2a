"""A city of one-way streets, and taxi trips through it told turn by turn.

A rows x columns grid of intersections; some of its streets are closed, some are one-way, and from every intersection
every other one can be reached. A document is `BOS pickup drop-off turn … turn EOS`: intersections are tokens, turns are
the four compass directions, and where the taxi is after some turns is said nowhere: a model has to keep track. After
Vafa et al. 2024, "Evaluating the World Model Implicit in a Generative Model", arXiv 2406.03689, on a city that the
seed draws.

The walk: at every intersection, with probability `wander` any turn that still allows to arrive within `max_turns`,
each as likely, else the turn of the one preferred shortest route. It ends where it first meets the drop-off. What
comes next depends on (intersection, drop-off, turns left) alone: `turn_distribution`.

The invariant: a (pickup, drop-off) pair belongs to one split, decided by `map_seed` alone.

Command: `nextlat-data task city --output DIR --train N --test M`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.base import require_at_least
from nextlat_dist.tasks.documents import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, Document, Split, id_array

TURNS = ("north", "east", "south", "west")
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # rows count southwards
NO_STREET = -1
PROMPT_TOKENS = 3  # BOS, pickup, drop-off


@dataclass(frozen=True)
class Trip:
    """What answer tokens do to a taxi that stands at the pickup.

    Attributes:
        places: the intersections visited, pickup first, up to the first illegal token.
        turns: the legal turns taken, one fewer than places.
        illegal: the first token that the city does not allow (no street that way, continuing at the drop-off, stopping
            elsewhere, no turn at all), None if there was none.
        arrived: the tokens end with an EOS at the drop-off.
    """

    places: tuple[int, ...]
    turns: tuple[int, ...]
    illegal: int | None
    arrived: bool


@dataclass(frozen=True)
class City:
    """The trips of one city; an intersection is a number, row * columns + column, a turn an index into `TURNS`.

    Raises:
        UserError: an option out of range, or streets that would cut the city apart.
    """

    rows: int = field(default=10, metadata={"help": "rows of intersections"})
    columns: int = field(default=10, metadata={"help": "columns of intersections"})
    one_way: float = field(default=0.3, metadata={"help": "share of the streets that are open in one direction only"})
    closed: float = field(default=0.1, metadata={"help": "share of the streets that are closed"})
    wander: float = field(
        default=0.5, metadata={"help": "probability of a random turn: 0 is the shortest route, 1 a random walk"}
    )
    max_turns: int = field(default=60, metadata={"help": "no walk is longer"})
    test_share: float = field(default=0.1, metadata={"help": "share of (pickup, drop-off) pairs kept for the test"})
    map_seed: int = field(default=0, metadata={"help": "draws the streets and the split"})

    name = "city"

    def __post_init__(self) -> None:
        require_at_least(self.name, rows=(self.rows, 2), columns=(self.columns, 2), map_seed=(self.map_seed, 0))
        for option in ("one_way", "closed", "wander", "test_share"):
            value = getattr(self, option)
            if not 0 <= value <= 1:
                raise UserError(f"{option} is {value}, but is a share from 0 to 1; change --{option.replace('_', '-')}")
        farthest = int(self.distances.max())
        if self.max_turns < farthest:
            raise UserError(
                f"max_turns is {self.max_turns}, but some trips of this city need {farthest} turns; raise --max-turns"
            )
        if not all(len(self.pairs(split)) for split in ("train", "test")):
            raise UserError(
                f"test_share is {self.test_share}, which leaves a split without (pickup, drop-off) pairs, of which the "
                f"city has {self.places * (self.places - 1)}; change --test-share"
            )

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def places(self) -> int:
        """How many intersections there are."""
        return self.rows * self.columns

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (*TURNS, *(f"r{place // self.columns}c{place % self.columns}" for place in range(self.places)))

    @cached_property
    def streets(self) -> np.ndarray:
        """int64 [places, 4]: where each turn leads, `NO_STREET` where there is none."""
        return _draw_streets(self.rows, self.columns, self.closed, self.one_way, self.map_seed)

    @cached_property
    def distances(self) -> np.ndarray:
        """int64 [places, places]: turns of the shortest route from the first to the second."""
        within = np.eye(self.places, dtype=bool)
        distances = np.where(within, 0, self.places)
        for turns in range(1, self.places):  # those within so many turns
            wider = within.copy()
            for turn in range(len(TURNS)):
                wider |= self._open[:, turn, None] & within[self.streets[:, turn]]
            if (wider == within).all():
                break
            distances[wider & ~within] = turns
            within = wider
        assert within.all(), "the streets leave an intersection out of reach"
        return distances

    @cached_property
    def _open(self) -> np.ndarray:
        return self.streets != NO_STREET

    @cached_property
    def preferred(self) -> np.ndarray:
        """int64 [places, places]: the first turn, in the order of `TURNS`, that is on a shortest route from the first
        to the second; of no meaning where they are the same.
        """
        preferred = np.zeros_like(self.distances)
        for turn in reversed(range(len(TURNS))):
            onward = self.distances[self.streets[:, turn]]
            preferred[self._open[:, turn, None] & (onward == self.distances - 1)] = turn
        return preferred

    def pairs(self, split: Split) -> np.ndarray:
        """int64 [pairs, 2]: the (pickup, drop-off) pairs of a split."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[str, np.ndarray]:
        pairs = np.argwhere(~np.eye(self.places, dtype=bool))
        order = np.random.default_rng([self.map_seed, 1]).permutation(len(pairs))
        tests = round(self.test_share * len(pairs))
        return {"test": pairs[np.sort(order[:tests])], "train": pairs[np.sort(order[tests:])]}

    @cached_property
    def _ways(self) -> list[list[tuple[int, int]]]:
        """By intersection: every turn there is, with where it leads."""
        return [[(turn, to) for turn, to in enumerate(row) if to != NO_STREET] for row in self.streets.tolist()]

    def open_turns(self, place: int, drop_off: int, turns_left: int) -> list[int]:
        """The turns at `place` after which the drop-off can still be reached within `turns_left - 1` turns."""
        return [turn for turn, onward in self._ways[place] if self.distances[onward, drop_off] < turns_left]

    def turn_distribution(self, drop_off: int, turns_left: int) -> np.ndarray:
        """float64 [places, 4]: the walk's probability of every turn, where the drop-off is within `turns_left` turns.

        A row is 0 at the drop-off (the walk ends) and where the drop-off is farther (the walk is never there).
        """
        allowed = self._open & (self.distances[self.streets, drop_off] < turns_left)
        allowed[drop_off] = False
        p = self.wander * allowed / np.maximum(allowed.sum(axis=1, keepdims=True), 1)
        walking = allowed.any(axis=1)
        p[walking, self.preferred[walking, drop_off]] += 1 - self.wander
        return p

    def sample(self, rng: np.random.Generator, split: Split) -> Document:
        """A walk between a pickup and a drop-off drawn evenly from the pairs of the split."""
        pairs = self.pairs(split)
        pickup, drop_off = pairs[rng.integers(len(pairs))].tolist()
        away = self.distances[:, drop_off].tolist()
        turns: list[int] = []
        place = pickup
        for left in range(self.max_turns, 0, -1):
            if place == drop_off:
                break
            turn = int(self.preferred[place, drop_off])
            if rng.random() < self.wander:
                choices = [turn for turn, onward in self._ways[place] if away[onward] < left]
                turn = choices[int(rng.random() * len(choices))]
            turns.append(turn)
            place = int(self.streets[place, turn])
        assert place == drop_off, "the walk ran out of turns"
        tokens = id_array(self.prompt(pickup, drop_off), [turn_id(turn) for turn in turns], [EOS_ID])
        return Document(tokens, PROMPT_TOKENS, f"{pickup} {drop_off}".encode())

    def prompt(self, pickup: int, drop_off: int) -> list[int]:
        return [BOS_ID, place_id(pickup), place_id(drop_off)]

    def problem(self, tokens: Sequence[int]) -> tuple[int, int]:
        """The pickup and the drop-off of a document or prompt."""
        return int(tokens[1]) - place_id(0), int(tokens[2]) - place_id(0)

    def legal(self, place: int, drop_off: int) -> list[int]:
        """The token ids that may come next for a taxi at `place`: EOS at the drop-off, else the streets' turns."""
        if place == drop_off:
            return [EOS_ID]
        return [turn_id(int(turn)) for turn in np.flatnonzero(self._open[place])]

    def follow(self, pickup: int, drop_off: int, answer: Sequence[int]) -> Trip:
        """Drive by answer tokens; what comes after an EOS is not read."""
        places = [pickup]
        turns: list[int] = []
        for token in map(int, answer):
            if token not in self.legal(places[-1], drop_off):
                return Trip(tuple(places), tuple(turns), token, False)
            if token == EOS_ID:
                return Trip(tuple(places), tuple(turns), None, True)
            turns.append(token - turn_id(0))
            places.append(int(self.streets[places[-1], turns[-1]]))
        return Trip(tuple(places), tuple(turns), None, False)


def turn_id(turn: int) -> int:
    return FIRST_SYMBOL_ID + turn


def place_id(place: int) -> int:
    return FIRST_SYMBOL_ID + len(TURNS) + place


def grid(rows: int, columns: int) -> np.ndarray:
    """int64 [rows * columns, 4]: the neighbour that each turn leads to, `NO_STREET` beyond the edge."""
    numbers = np.pad(np.arange(rows * columns).reshape(rows, columns), 1, constant_values=NO_STREET)
    return np.stack([numbers[1 + r : 1 + r + rows, 1 + c : 1 + c + columns].ravel() for r, c in MOVES], axis=1)


def _draw_streets(rows: int, columns: int, closed: float, one_way: float, seed: int) -> np.ndarray:
    """Go through all two-way streets in random order: close one, or one side of it, if its ends still find each other;
    as nothing else can become unreachable, the whole city stays connected.
    """
    streets = grid(rows, columns)
    rng = np.random.default_rng([seed, 0])
    sides = np.argwhere(streets != NO_STREET)
    two_way = sides[np.isin(sides[:, 1], (1, 2))]  # eastwards and southwards: every street once
    wanted = {"closed": round(closed * len(two_way)), "one_way": round(one_way * len(two_way))}
    done = dict.fromkeys(wanted, 0)
    for here, turn in rng.permutation(two_way).tolist():
        there = int(streets[here, turn])
        both = [(here, turn), (there, (turn + 2) % 4)]
        first = int(rng.integers(2))
        for kind, removed in (("closed", both), ("one_way", [both[first]]), ("one_way", [both[1 - first]])):
            if done[kind] < wanted[kind] and _close(streets, removed):
                done[kind] += 1
                break
    for kind, count in done.items():
        if count < wanted[kind]:
            raise UserError(
                f"{kind} asks for {wanted[kind]} of {len(two_way)} streets, but only {count} can be while every "
                f"intersection stays within reach; lower --{kind.replace('_', '-')}, or change --map-seed"
            )
    return streets


def _close(streets: np.ndarray, sides: list[tuple[int, int]]) -> bool:
    """Take away sides of streets, (intersection, turn) each, unless that leaves their ends without another way."""
    leads = [int(streets[side]) for side in sides]
    for side in sides:
        streets[side] = NO_STREET
    if all(_reaches(streets, here, there) for (here, _), there in zip(sides, leads, strict=True)):
        return True
    for side, there in zip(sides, leads, strict=True):
        streets[side] = there
    return False


def _reaches(streets: np.ndarray, start: int, goal: int) -> bool:
    seen, edge = {start}, [start]
    while edge and goal not in seen:
        edge = [there for here in edge for there in streets[here].tolist() if there != NO_STREET and there not in seen]
        edge = list(dict.fromkeys(edge))
        seen.update(edge)
    return goal in seen
