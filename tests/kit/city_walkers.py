"""Walkers whose scores are known: a function of the history, and the distribution of the city's own walks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from nextlat_dist.tasks import EOS_ID, vocab_size
from nextlat_dist.tasks.city import PROMPT_TOKENS, City, turn_id


class FunctionWalker:
    """Expects next what `expect(history)` says, [vocab] probabilities; nothing is asked inside a prompt."""

    def __init__(self, expect: Callable[[list[int]], np.ndarray]) -> None:
        known = cache(lambda history: expect(list(history)))
        self.expect = lambda history: known(tuple(history))

    def log_probabilities(self, histories: Sequence[Sequence[int]]) -> list[np.ndarray]:
        with np.errstate(divide="ignore"):
            return [
                np.log([self.expect(list(history[: max(end, PROMPT_TOKENS)])) for end in range(1, len(history) + 1)])
                for history in histories
            ]

    def continuations(
        self, histories: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        assert temperature in (0.0, 1.0)
        return [
            self._continue(list(history), max_new_tokens, temperature, np.random.default_rng([seed, row]))
            for row, history in enumerate(histories)
        ]

    def _continue(self, history: list[int], count: int, temperature: float, rng: np.random.Generator) -> list[int]:
        written: list[int] = []
        while len(written) < count and EOS_ID not in written:
            p = self.expect(history + written)
            written.append(int(rng.choice(len(p), p=p)) if temperature else int(p.argmax()))
        return written


def true_walker(city: City) -> FunctionWalker:
    """Knows the city, keeps track of where it is, and expects what its walks do."""

    def expect(history: list[int]) -> np.ndarray:
        pickup, drop_off = city.problem(history)
        trip = city.follow(pickup, drop_off, history[PROMPT_TOKENS:])
        p = np.zeros(vocab_size(city))
        if trip.illegal is not None:
            return p  # after a token that it did not expect it expects none
        if trip.places[-1] == drop_off:
            p[EOS_ID] = 1
        else:
            p[turn_id(0) : turn_id(4)] = city.turn_distribution(drop_off, city.max_turns - len(trip.turns))[
                trip.places[-1]
            ]
        return p

    return FunctionWalker(expect)


def reciting_walker(city: City) -> FunctionWalker:
    """Knows the preferred route of every (pickup, drop-off) by heart, and recites it whatever turns were taken."""

    def expect(history: list[int]) -> np.ndarray:
        place, drop_off = city.problem(history)
        route = []
        while place != drop_off:
            route.append(int(city.preferred[place, drop_off]))
            place = int(city.streets[place, route[-1]])
        answer = [*map(turn_id, route), EOS_ID]
        p = np.zeros(vocab_size(city))
        p[answer[min(len(history) - PROMPT_TOKENS, len(answer) - 1)]] = 1
        return p

    return FunctionWalker(expect)
