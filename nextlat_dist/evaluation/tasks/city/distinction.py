"""Distinction: does the model tell different situations apart, and only by what makes them different?

Two histories with the same drop-off and of the same length that end at different intersections have *telling
suffixes*: shortest continuations that the city's walks may take from the first and not from the second. A model
accepts a suffix if every token of it has a probability above `EPSILON`; its own telling suffixes are the shortest that
it accepts after the first and not after the second history. *Recall*: the share of the city's telling suffixes that the
model accepts after the first history alone. *Precision*: the share of the model's telling suffixes that the city's
walks may take from the first intersection alone. Both over suffixes of up to `LONGEST` tokens, as means over pairs. A
model that says the same whatever came before compresses perfectly and tells nothing apart.

After Vafa et al. 2024 (the boundary of Myhill and Nerode); there, suffixes are sampled (`sampled_distinction`), here
all of a few tokens are tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nextlat_dist.evaluation.tasks.city.walker import Walker
from nextlat_dist.tasks import EOS_ID, Document
from nextlat_dist.tasks.city import PROMPT_TOKENS, TURNS, City, turn_id

EPSILON = 0.01  # as in Vafa et al.
LONGEST = 3  # tokens of a suffix: up to 5 + 4·5 + 4²·5 = 105 are tried
ANSWERS = (EOS_ID, *map(turn_id, range(len(TURNS))))
Suffix = tuple[int, ...]


@dataclass(frozen=True)
class Apart:
    """Two histories after `turns` turns to `drop_off` that stand at different places."""

    first: list[int]
    second: list[int]
    first_place: int
    second_place: int
    drop_off: int
    turns: int


def histories_apart(city: City, documents: Sequence[Document], count: int, rng: np.random.Generator) -> list[Apart]:
    """Up to `count` pairs of two documents, cut after the same random number of turns, short of the drop-off."""
    trips = defaultdict(list)
    for document in documents:
        tokens = document.tokens.tolist()
        pickup, drop_off = city.problem(tokens)
        trips[drop_off].append((tokens, city.follow(pickup, drop_off, tokens[PROMPT_TOKENS:]).places))
    found: list[Apart] = []
    for drop_off, walks in sorted(trips.items()):
        for number, (tokens, places) in enumerate(walks):
            turns = int(rng.integers(1, len(places)))
            if turns == len(places) - 1:
                continue  # it has arrived there
            others = [
                (other, where[turns])
                for other, where in walks[:number]
                if len(where) - 1 > turns and where[turns] != places[turns]
            ]
            if others:
                other, place = others[int(rng.integers(len(others)))]
                end = PROMPT_TOKENS + turns
                found.append(Apart(tokens[:end], other[:end], places[turns], place, drop_off, turns))
    return [found[row] for row in sorted(rng.permutation(len(found))[:count].tolist())]


def distinction(walker: Walker, city: City, pairs: Sequence[Apart]) -> tuple[float, float]:
    """(recall, precision): means over the pairs, recall over those that have telling suffixes.

    A model without telling suffixes for a pair has told nothing wrong: its precision there is 1, as in Vafa et al.
    """
    recalls, precisions = [], []
    for pair, accepted in zip(pairs, _accepted(walker, pairs), strict=True):
        telling = set(telling_suffixes(city, pair))
        if telling:
            recalls.append(float(np.mean([accepted.get(suffix, True) is False for suffix in telling])))
        told = [suffix for suffix, by_both in accepted.items() if not by_both and accepted.get(suffix[:-1], True)]
        right = [
            possible(city, pair.first_place, pair, suffix) and not possible(city, pair.second_place, pair, suffix)
            for suffix in told
        ]
        precisions.append(float(np.mean(right)) if right else 1.0)
    return float(np.mean(recalls)), float(np.mean(precisions))


def _accepted(walker: Walker, pairs: Sequence[Apart]) -> list[dict[Suffix, bool]]:
    """The suffixes accepted after each pair's first history, and whether they are after the second one, too."""
    accepted: list[dict[Suffix, bool]] = [{} for _ in pairs]
    edge: list[tuple[int, Suffix, bool]] = [(row, (), True) for row in range(len(pairs))]
    for _ in range(LONGEST):
        firsts = iter(_allowed(walker, [[*pairs[row].first, *suffix] for row, suffix, _ in edge]))
        seconds = iter(_allowed(walker, [[*pairs[row].second, *suffix] for row, suffix, by_both in edge if by_both]))
        further: list[tuple[int, Suffix, bool]] = []
        for row, suffix, by_both in edge:
            also = next(seconds) if by_both else frozenset()
            for token in next(firsts):
                longer = (*suffix, token)
                accepted[row][longer] = token in also
                if token != EOS_ID:
                    further.append((row, longer, token in also))
        edge = further
    return accepted


def _allowed(walker: Walker, histories: list[list[int]]) -> Iterator[frozenset[int]]:
    """The answer tokens above `EPSILON` after each history."""
    for read in walker.log_probabilities(histories) if histories else []:
        yield frozenset(token for token in ANSWERS if read[-1][token] > np.log(EPSILON))


def telling_suffixes(city: City, pair: Apart) -> Iterator[Suffix]:
    """Shortest suffixes that a walk may take from the first place and not from the second."""
    edge: list[Suffix] = [()]
    for _ in range(LONGEST):
        longer = [(*suffix, token) for suffix in edge for token in ANSWERS]
        longer = [suffix for suffix in longer if possible(city, pair.first_place, pair, suffix)]
        common = [suffix for suffix in longer if possible(city, pair.second_place, pair, suffix)]
        yield from (suffix for suffix in longer if suffix not in common)
        edge = common


def possible(city: City, place: int, pair: Apart, suffix: Suffix) -> bool:
    """Whether a walk to the pair's drop-off, at `place` after its turns, may continue like this."""
    left = city.max_turns - pair.turns
    for number, token in enumerate(suffix):
        if place == pair.drop_off:
            return suffix[number:] == (EOS_ID,)
        turns = city.open_turns(place, pair.drop_off, left - number)
        if city.wander == 0:
            turns = [int(city.preferred[place, pair.drop_off])]
        if token - turn_id(0) not in turns:
            return False
        place = int(city.streets[place, token - turn_id(0)])
    return True
