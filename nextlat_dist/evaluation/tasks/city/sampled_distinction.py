"""Distinction as Vafa et al. 2024 have it: from suffixes that are sampled, of any length.

Of two histories that end at different intersections (`distinction.Apart`), `CONTINUATIONS` are sampled at temperature 1
from the model after the first; one is a *telling suffix* of the model up to its first token that the model does not
accept after the second, where it accepts every token up to there after the first. As many of the city's own walks,
drawn from the first intersection, are telling suffixes of the city up to their first token that its walks may not take
from the second. *Precision*: the share of the model's that the city tells apart, too; *recall*: the share of the city's
that the model does. A token is accepted with a probability above `EPSILON`. Where `distinction` tries every suffix of a
few tokens, this one weighs them by how likely they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nextlat_dist.evaluation.tasks.city.compression import CONTINUATIONS, TRIALS
from nextlat_dist.evaluation.tasks.city.distinction import EPSILON, Apart, Suffix, possible
from nextlat_dist.evaluation.tasks.city.walker import Walker
from nextlat_dist.tasks import EOS_ID
from nextlat_dist.tasks.city import City, turn_id


def sampled_distinction(walker: Walker, city: City, pairs: Sequence[Apart], seed: int) -> tuple[float, float]:
    """(recall, precision): means over those of the first `TRIALS` pairs that have telling suffixes, recall over the
    city's, precision over the model's; without any, 1.
    """
    trials = [pair for pair in pairs[:TRIALS] for _ in range(CONTINUATIONS)]
    longest = city.max_turns + 1 - min(pair.turns for pair in trials)
    continued = walker.continuations([pair.first for pair in trials], longest, 1.0, seed)
    written = [tuple(tokens[: _left(city, pair)]) for pair, tokens in zip(trials, continued, strict=True)]
    precisions = []
    for pair, suffix, first, second in _read(walker, trials, written):
        end = int(np.argmin(second)) + 1  # of the first token that is not accepted after the second history
        if not second.all() and first[:end].all():
            precisions.append((pair, _tells(city, pair, suffix[:end])))
    rng = np.random.default_rng([seed, 5])
    told = [(pair, _telling(city, pair, _walk(city, pair, rng))) for pair in trials]
    walks = [(pair, suffix) for pair, suffix in told if suffix is not None]
    recalls = [
        (pair, bool(first.all() and not second.all()))
        for pair, _, first, second in _read(walker, [pair for pair, _ in walks], [suffix for _, suffix in walks])
    ]
    return _mean_over_pairs(recalls), _mean_over_pairs(precisions)


def _left(city: City, pair: Apart) -> int:
    """Tokens that a trip may still have, EOS among them."""
    return city.max_turns + 1 - pair.turns


def _read(
    walker: Walker, pairs: Sequence[Apart], suffixes: Sequence[Suffix]
) -> Iterator[tuple[Apart, Suffix, np.ndarray, np.ndarray]]:
    """Each pair and suffix, and which of its tokens are accepted after the first and after the second history."""
    if not pairs:
        return
    accepted = []
    for histories in ([pair.first for pair in pairs], [pair.second for pair in pairs]):
        read = walker.log_probabilities(
            [[*history, *suffix[:-1]] for history, suffix in zip(histories, suffixes, strict=True)]
        )
        accepted.append(
            [
                np.array([row[len(history) - 1 + place][token] for place, token in enumerate(suffix)]) > np.log(EPSILON)
                for row, history, suffix in zip(read, histories, suffixes, strict=True)
            ]
        )
    yield from zip(pairs, suffixes, *accepted, strict=True)


def _walk(city: City, pair: Apart, rng: np.random.Generator) -> Suffix:
    """One of the city's walks from the first intersection, to the end."""
    place, suffix = pair.first_place, list[int]()
    while place != pair.drop_off:
        p = city.turn_distribution(pair.drop_off, city.max_turns - pair.turns - len(suffix))[place]
        turn = int(rng.choice(len(p), p=p))
        suffix.append(turn_id(turn))
        place = int(city.streets[place, turn])
    return (*suffix, EOS_ID)


def _telling(city: City, pair: Apart, walk: Suffix) -> Suffix | None:
    """A walk from the first intersection up to its first token that is not possible from the second."""
    for end in range(1, len(walk) + 1):
        if not possible(city, pair.second_place, pair, walk[:end]):
            return walk[:end]
    return None


def _tells(city: City, pair: Apart, suffix: Suffix) -> bool:
    return possible(city, pair.first_place, pair, suffix) and not possible(city, pair.second_place, pair, suffix)


def _mean_over_pairs(found: Sequence[tuple[Apart, bool]]) -> float:
    by_pair: dict[int, list[bool]] = {}
    for pair, right in found:
        by_pair.setdefault(id(pair), []).append(right)
    return float(np.mean([np.mean(rights) for rights in by_pair.values()])) if by_pair else 1.0
