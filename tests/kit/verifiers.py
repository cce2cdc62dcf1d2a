"""Verifiers of drafts that are wrong on purpose, which every test of the distribution must find."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from nextlat_dist.inference.sampling import draw
from nextlat_dist.inference.speculative.verify import Drafts, verify_sampled

Outcome = tuple[list[int], list[int]]


Verifier = Callable[[torch.Tensor, Drafts, Sequence[Sequence[float]]], Outcome]


def always_accept(p: torch.Tensor, drafts: Drafts, uniforms: Sequence[Sequence[float]]) -> Outcome:
    lengths = [len(tokens) for tokens in drafts.tokens()]
    return lengths, _drawn(p, drafts, lengths, uniforms)


def draft_probability_of_one(p: torch.Tensor, drafts: Drafts, uniforms: Sequence[Sequence[float]]) -> Outcome:
    for step in drafts.steps:
        step.q_token = [1.0] * len(step.tokens)
    return verify_sampled(p, drafts, uniforms)


def resample_from_base(p: torch.Tensor, drafts: Drafts, uniforms: Sequence[Sequence[float]]) -> Outcome:
    accepted, _ = verify_sampled(p, drafts, uniforms)
    return accepted, _drawn(p, drafts, accepted, uniforms)


def bonus_from_the_row_before(p: torch.Tensor, drafts: Drafts, uniforms: Sequence[Sequence[float]]) -> Outcome:
    accepted, following = verify_sampled(p, drafts, uniforms)
    lengths = [len(tokens) for tokens in drafts.tokens()]
    wrong = _drawn(p, drafts, [max(length - 1, 0) for length in lengths], uniforms)
    return accepted, [
        w if n == length else f for n, length, w, f in zip(accepted, lengths, wrong, following, strict=True)
    ]


def _drawn(p: torch.Tensor, drafts: Drafts, at: Sequence[int], uniforms: Sequence[Sequence[float]]) -> list[int]:
    starts = list(itertools.accumulate((len(tokens) + 1 for tokens in drafts.tokens()), initial=0))[:-1]
    last = torch.tensor([numbers[-1] for numbers in uniforms], dtype=torch.float64)
    rows: list[int] = draw(p[[start + place for start, place in zip(starts, at, strict=True)]], last).tolist()
    return rows


WRONG_VERIFIERS = [always_accept, draft_probability_of_one, resample_from_base, bonus_from_the_row_before]
