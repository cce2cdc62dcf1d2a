"""Speculative sampling, exactly: every branch of a cycle is enumerated and the joint law compared with the base's.

The harness treats the verifier as a black box: an outcome is a step function of each uniform number, and its steps are
found by bisection. Wrong verifiers are run through the same harness and must be noticed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from nextlat_dist.inference.sampling import Sampling, draw
from nextlat_dist.inference.verify import residual, verify_greedy, verify_sampled

Verifier = Callable[[torch.Tensor, torch.Tensor, Sequence[int], Sequence[float]], tuple[int, int]]
TOP = math.nextafter(1.0, 0.0)
VOCABULARY, DRAFTS = 3, 2


class Tables:
    """A base and a draft distribution for every prefix of up to DRAFTS tokens, all different."""

    def __init__(self, sampling: Sampling, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base: dict[tuple[int, ...], torch.Tensor] = {}
        self.draft: dict[tuple[int, ...], torch.Tensor] = {}
        for length in range(DRAFTS + 1):
            for prefix in itertools.product(range(VOCABULARY), repeat=length):
                for table in (self.base, self.draft):
                    logits = 1.5 * torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
                    table[prefix] = sampling.probabilities(logits)

    def joint(self) -> dict[tuple[int, ...], float]:
        return {
            tokens: math.prod(float(self.base[tokens[:i]][tokens[i]]) for i in range(DRAFTS + 1))
            for tokens in itertools.product(range(VOCABULARY), repeat=DRAFTS + 1)
        }


def step_lengths(outcome: Callable[[float], int], low: float = 0.0, high: float = TOP) -> dict[int, float]:
    """Share of the interval on which a step function takes each value."""
    lengths: dict[int, float] = defaultdict(float)
    while outcome(low) != outcome(high):
        left, right = low, high
        while math.nextafter(left, 1.0) < right and right - left > 1e-17:
            middle = (left + right) / 2
            left, right = (middle, right) if outcome(middle) == outcome(low) else (left, middle)
        lengths[outcome(low)] += right - low
        low = right
    lengths[outcome(high)] += high - low
    return lengths


def law_of_a_cycle(tables: Tables, verifier: Verifier) -> dict[tuple[int, ...], float]:
    """Joint law of the first DRAFTS + 1 tokens: one cycle, and the base model for what it leaves open."""
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for drafted in itertools.product(range(VOCABULARY), repeat=DRAFTS):
        q = torch.stack([tables.draft[drafted[:i]] for i in range(DRAFTS)])
        p = torch.stack([tables.base[drafted[:i]] for i in range(DRAFTS + 1)])
        probability = math.prod(float(q[i, drafted[i]]) for i in range(DRAFTS))
        if probability == 0:
            continue
        verify = partial(verifier, p, q, drafted)

        def kept(position: int, uniform: float, verify: partial[tuple[int, int]] = verify) -> int:
            return int(verify([0.0] * position + [uniform] + [TOP] * (DRAFTS - position))[0] > position)

        for accepted in range(DRAFTS + 1):
            branch = probability
            for position in range(min(accepted + 1, DRAFTS)):
                share = step_lengths(partial(kept, position)).get(1, 0.0)
                branch *= share if position < accepted else 1 - share
            if branch < 1e-14:
                continue
            numbers = [0.0] * accepted + [TOP] * (DRAFTS - accepted)
            following = step_lengths(lambda u, n=numbers, verify=verify: verify([*n, u])[1])
            for token, share in following.items():
                emitted = (*drafted[:accepted], token)
                for rest in itertools.product(range(VOCABULARY), repeat=DRAFTS - accepted):
                    whole = emitted + rest
                    tail = math.prod(float(tables.base[whole[:i]][whole[i]]) for i in range(len(emitted), DRAFTS + 1))
                    law[whole] += branch * share * tail
    return law


def largest_error(tables: Tables, verifier: Verifier) -> float:
    law = law_of_a_cycle(tables, verifier)
    return max(abs(law.get(tokens, 0.0) - probability) for tokens, probability in tables.joint().items())


SAMPLINGS = [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.7), Sampling(2.0, 2, 0.9)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_joint_law_is_the_base_models(sampling: Sampling) -> None:
    assert largest_error(Tables(sampling, seed=5), verify_sampled) < 1e-12


def always_accept(
    p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int], uniforms: Sequence[float]
) -> tuple[int, int]:
    return len(drafted), draw(p[len(drafted)], uniforms[-1])


def no_draft_probability(
    p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int], uniforms: Sequence[float]
) -> tuple[int, int]:
    return verify_sampled(p, torch.ones_like(q), drafted, uniforms)


def resample_from_base(
    p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int], uniforms: Sequence[float]
) -> tuple[int, int]:
    accepted, _ = verify_sampled(p, q, drafted, uniforms)
    return accepted, draw(p[accepted], uniforms[-1])


def stale_bonus_row(
    p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int], uniforms: Sequence[float]
) -> tuple[int, int]:
    accepted, token = verify_sampled(p, q, drafted, uniforms)
    return accepted, draw(p[accepted - 1], uniforms[-1]) if accepted == len(drafted) else token


@pytest.mark.parametrize("wrong", [always_accept, no_draft_probability, resample_from_base, stale_bonus_row])
def test_the_harness_notices_a_wrong_verifier(wrong: Verifier) -> None:
    assert largest_error(Tables(Sampling(1.0), seed=5), wrong) > 1e-2


def test_identical_distributions_accept_everything() -> None:
    p = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert verify_sampled(p, p[:3], [1, 2, 3], [TOP] * 4)[0] == 3
    torch.testing.assert_close(residual(p[0], p[0].clone()), p[0])


def test_without_drafts_the_next_token_is_drawn_from_the_base() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]])
    assert [verify_sampled(p, p[:0], [], [u])[1] for u in (0.4, 0.6, 0.9)] == [0, 1, 2]


def test_greedy() -> None:
    assert verify_greedy([5, 6, 7, 8], [5, 6, 7]) == (3, 8)
    assert verify_greedy([5, 6, 7, 8], [5, 1, 7]) == (1, 6)
    assert verify_greedy([5, 6], [4]) == (0, 5)
    assert verify_greedy([5], []) == (0, 5)
