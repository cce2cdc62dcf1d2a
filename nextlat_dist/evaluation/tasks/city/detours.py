"""Detours: some of the model's turns are replaced by others; does it still arrive?

A model that knows where it is finds another way; one that recites a route is lost. Before every turn, with the given
probability, the turn that the model would take (greedily) is replaced by another one from which the drop-off can still
be reached in time: a random one, or the one that the model holds least likely. The trip counts if all of the model's
own tokens are legal and it stops at the drop-off within the city's `max_turns`. After Vafa et al. 2024.

Invariant: which turns are replaced, and what is drawn for random ones, depends on the generator alone, not on the
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nextlat_dist.evaluation.tasks.city.walker import Walker
from nextlat_dist.evaluation.tasks.scores import Share
from nextlat_dist.tasks import EOS_ID
from nextlat_dist.tasks.city import City, turn_id

Kind = Literal["random", "least_likely"]


@dataclass
class _Drive:
    """A taxi on its way."""

    history: list[int]
    place: int
    drop_off: int
    turns: int = 0
    detours: int = 0
    arrived: bool | None = None  # None: still driving


def drive_with_detours(
    walker: Walker,
    city: City,
    problems: Sequence[tuple[int, int]],
    probability: float,
    kind: Kind,
    rng: np.random.Generator,
) -> tuple[Share, float]:
    """The trips that arrive, and how many detours a trip had on average.

    Args:
        problems: (pickup, drop-off) pairs.
        probability: of a detour, at every turn that has another way.
    """
    replaced = rng.random((len(problems), city.max_turns)) < probability
    draws = rng.random((len(problems), city.max_turns))
    trips = [_Drive(city.prompt(*problem), *problem) for problem in problems]
    driving = list(range(len(trips)))
    while driving:
        needed = max(_tokens_to_next_detour(trips[row], replaced[row]) for row in driving)
        written = walker.continuations([trips[row].history for row in driving], needed, temperature=0.0, seed=0)
        stopped: list[tuple[int, list[int]]] = []  # trips at a detour, and the tokens that may be taken there
        for row, tokens in zip(driving, written, strict=True):
            choices = _follow(trips[row], city, tokens, replaced[row])
            if choices:
                stopped.append((row, choices))
        if kind == "least_likely" and stopped:
            expected = walker.log_probabilities([trips[row].history for row, _ in stopped])
            chosen = [
                min(choices, key=last[-1].__getitem__) for (_, choices), last in zip(stopped, expected, strict=True)
            ]
        else:
            chosen = [choices[int(draws[row, trips[row].turns] * len(choices))] for row, choices in stopped]
        for (row, _), token in zip(stopped, chosen, strict=True):
            trips[row].detours += 1
            _turn(trips[row], city, token)
        driving = [row for row in driving if trips[row].arrived is None]
    return Share.of(bool(trip.arrived) for trip in trips), float(np.mean([trip.detours for trip in trips]))


def _tokens_to_next_detour(trip: _Drive, replaced: np.ndarray) -> int:
    """How many of the model's tokens are wanted: up to the one to replace, or up to the EOS after the last turn."""
    ahead = np.flatnonzero(replaced[trip.turns :])
    return 1 + (int(ahead[0]) if len(ahead) else len(replaced) - trip.turns)


def _follow(trip: _Drive, city: City, tokens: Sequence[int], replaced: np.ndarray) -> list[int]:
    """Follow the model's tokens to the trip's end or to a detour; the tokens that may be taken there, if it is one."""
    if not tokens:
        trip.arrived = False
    for token in tokens:
        if trip.place != trip.drop_off and replaced[trip.turns]:
            turns = city.open_turns(trip.place, trip.drop_off, city.max_turns - trip.turns)
            choices = [turn_id(turn) for turn in turns if turn_id(turn) != token]
            if choices:
                return choices
        if token not in city.legal(trip.place, trip.drop_off):
            trip.arrived = False
        elif token == EOS_ID:
            trip.arrived = True
        else:
            _turn(trip, city, token)
        if trip.arrived is not None:
            break
    return []


def _turn(trip: _Drive, city: City, token: int) -> None:
    trip.history.append(token)
    trip.place = int(city.streets[trip.place, token - turn_id(0)])
    trip.turns += 1
    if trip.turns == city.max_turns and trip.place != trip.drop_off:
        trip.arrived = False
