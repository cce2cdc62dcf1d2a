"""Sampled output of the whole decoder against the base model's: chi-square and total variation of joint tokens.

100,000 continuations each; the significance of a test is divided by the number of tests. A decoder that is wrong in one
of the ways that speculative decoding can be wrong goes through the same tests and fails them.

Command: `pytest tests/inference/speculative/test_distribution.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.engine import engine as engine_module
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.generation import DraftLength, Piece, Request
from nextlat_dist.inference.loading import load
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.policy import AdaptivePolicy
from nextlat_dist.inference.speculative.verify import Drafts, DraftStep
from nextlat_dist.inference.stopping import Stops
from tests.kit.exports import calibration, joint_distribution, reduced, tiny_world
from tests.kit.verifiers import WRONG_VERIFIERS, Verifier

PROMPT = [0]
COUNT = 100_000
ROWS = 1024

CASES: dict[str, tuple[DraftLength, Sampling, list[int] | None, int]] = {
    # name: (draft length, sampling, ids that may be drafted, new tokens)
    "two drafts": (2, Sampling(1.0), None, 4),
    "three drafts, reduced, top-k": (3, Sampling(0.6, top_k=3), [3, 1, 0], 5),
    "adaptive, top-p": ("adaptive", Sampling(1.2, top_p=0.9), None, 4),
}
SLOW_CASES: dict[str, tuple[DraftLength, Sampling, list[int] | None, int]] = {
    f"{length}, {sampling}, {ids}": (length, sampling, ids, 5)
    for length in (1, 2, 3, "adaptive")
    for sampling in (Sampling(1.0), Sampling(0.6, top_k=3), Sampling(1.2, top_p=0.8))
    for ids in (None, [3, 1])  # of the pairs, one whose drafts are both kept and rejected at every position
}
ALPHA = 0.01 / (2 * (len(CASES) + len(SLOW_CASES)))  # Bonferroni: two p-values per case


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_world(tmp_path_factory.mktemp("distribution"), 4)


def loaded(export: Path, ids: list[int] | None = None) -> Decoder:
    decoder = load(export, "cpu", torch.float64)
    if ids:
        decoder.drafter = reduced(decoder, ids)
    # A cost at which the adaptive policy stops now here, now there, in every case below.
    decoder.calibration = calibration(draft=0.2)
    return decoder


def sample(
    decoder: Decoder, draft_length: DraftLength, sampling: Sampling, new_tokens: int, count: int
) -> tuple[Counter[tuple[int, ...]], list[int], list[int]]:
    """Continuations of PROMPT, and how many tokens were drafted and accepted by position."""
    seen: Counter[tuple[int, ...]] = Counter()
    drafted, accepted = [0] * new_tokens, [0] * new_tokens
    policy = None
    if draft_length == "adaptive":  # every row at its own pace, which `generate` keeps to batches of one row
        assert decoder.calibration is not None
        policy = AdaptivePolicy(decoder.calibration, sampling.temperature, 1, None)
    request = Request(new_tokens, draft_length, sampling, Stops(decoder.eos_token_ids))
    results = []
    for start in range(0, count, ROWS):
        seeds = range(20_000 + start, 20_000 + min(start + ROWS, count))
        batch = DecodingEngine(decoder.llama, decoder.drafter, [PROMPT] * len(seeds), request, policy, seeds)
        for _ in batch.run():
            pass
        results += batch.results
    for result in results:
        seen[tuple(result.token_ids)] += 1
        for position, (made, kept) in enumerate(
            zip(result.drafted_by_position, result.accepted_by_position, strict=True)
        ):
            drafted[position] += made
            accepted[position] += kept
    return seen, drafted, accepted


def p_values(seen: Counter[tuple[int, ...]], distribution: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """Of the chi-square test and of the total variation; 0 where something impossible was seen."""
    count = seen.total()
    possible = {tokens: p for tokens, p in distribution.items() if p > 0}
    if set(seen) - set(possible):
        return 0.0, 0.0
    # Chi-square, with the rare outcomes as one.
    common = {tokens for tokens, p in possible.items() if count * p >= 10}
    rare = sum(p for tokens, p in possible.items() if tokens not in common)
    cells = [(seen[tokens], count * possible[tokens]) for tokens in common]
    if count * rare >= 10:
        cells.append((sum(number for tokens, number in seen.items() if tokens not in common), count * rare))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    # Total variation: its mean is at most half the sum of standard deviations, and one sample moves it by 1 / count at
    # most, so that McDiarmid's inequality bounds how likely it is to lie further out.
    distance = sum(abs(seen[tokens] / count - p) for tokens, p in possible.items()) / 2
    mean = sum(math.sqrt(p * (1 - p) / count) for p in possible.values()) / 2
    bound = math.exp(-2 * count * max(distance - mean, 0.0) ** 2)
    return float(chi2.sf(statistic, len(cells) - 1)), bound


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)])
def test_sampled_output_follows_the_base_model(case: str, export: Path) -> None:
    draft_length, sampling, ids, new_tokens = (CASES | SLOW_CASES)[case]
    seen, drafted, accepted = sample(loaded(export, ids), draft_length, sampling, new_tokens, COUNT)
    assert seen.total() == COUNT
    longest = min(2 if draft_length == "adaptive" else draft_length, new_tokens - 2)
    assert all(drafted[position] > 0.02 * COUNT for position in range(longest))
    assert all(0 < accepted[position] < drafted[position] for position in range(longest))
    if draft_length == "adaptive":
        _, fixed, _ = sample(loaded(export, ids), 2, sampling, new_tokens, 2_000)
        assert drafted[1] / drafted[0] < 0.9 * fixed[1] / fixed[0], "it stops early now and then"
    distribution = joint_distribution(export, sampling, PROMPT, new_tokens)
    assert sum(distribution.values()) == pytest.approx(1, abs=1e-12)
    chi_square, total_variation = p_values(seen, distribution)
    assert chi_square > ALPHA
    assert total_variation > ALPHA


def of_a_wrong_decoder(export: Path, draft_length: DraftLength = 2) -> tuple[float, float]:
    sampling = Sampling(1.0)
    seen, *_ = sample(loaded(export), draft_length, sampling, 4, COUNT // 5)
    return p_values(seen, joint_distribution(export, sampling, PROMPT, 4))


def test_a_right_decoder_passes_with_as_few_samples(export: Path) -> None:
    """The control of the tests below."""
    assert min(of_a_wrong_decoder(export)) > ALPHA


@pytest.mark.parametrize("wrong", WRONG_VERIFIERS)
def test_a_wrong_verifier_is_noticed(wrong: Verifier, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "verify_sampled", wrong)
    assert max(of_a_wrong_decoder(export)) < ALPHA


def keep_a_rejected_slot(cycle: Callable[[DecodingEngine], list[Piece]]) -> Callable[[DecodingEngine], list[Piece]]:
    """Every cycle leaves the first rejected slot of a row in reach."""

    def wrong(batch: DecodingEngine) -> list[Piece]:
        before = [result.drafted for result in batch.results]
        pieces = cycle(batch)
        drafted = [result.drafted - earlier for result, earlier in zip(batch.results, before, strict=True)]
        rejected = {piece.row for piece in pieces if drafted[piece.row] > piece.accepted}
        batch.cache.lengths = [
            length + (row.number in rejected) for row, length in zip(batch.rows, batch.cache.lengths, strict=True)
        ]
        return pieces

    return wrong


def discard_unlikely_drafts(
    draft: Callable[[DecodingEngine], tuple[Drafts, list[list[float]]]],
) -> Callable[[DecodingEngine], tuple[Drafts, list[list[float]]]]:
    """Drafts end before a token of less than 0.4: a decision by a token's own value."""

    def wrong(batch: DecodingEngine) -> tuple[Drafts, list[list[float]]]:
        drafts, confidences = draft(batch)
        on = set(range(drafts.rows))
        steps = []
        for step in drafts.steps:
            assert step.q is not None
            assert step.q_token is not None
            on = {row for row, q in zip(step.rows, step.q_token, strict=True) if row in on and q >= 0.4}
            places = [place for place, row in enumerate(step.rows) if row in on]
            if places:
                rows, tokens = ([own[place] for place in places] for own in (step.rows, step.tokens))
                steps.append(DraftStep(rows, tokens, step.q[places], [step.q_token[place] for place in places]))
        drafts.steps = steps
        return drafts, confidences

    return wrong


MUTANTS: list[tuple[str, Any]] = [("cycle", keep_a_rejected_slot), ("draft", discard_unlikely_drafts)]


@pytest.mark.parametrize(("method", "mutate"), MUTANTS, ids=[mutate.__name__ for _, mutate in MUTANTS])
def test_a_wrong_engine_is_noticed(method: str, mutate: Any, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodingEngine, method, mutate(getattr(DecodingEngine, method)))
    create = engine_module.Llama.new_cache
    monkeypatch.setattr(
        engine_module.Llama, "new_cache", lambda llama, rows, capacity, *more: create(llama, rows, capacity + 4, *more)
    )
    assert max(of_a_wrong_decoder(export)) < ALPHA
