"""Sampled output of the whole decoder against the base model's joint distribution, by chi-square; fixed seeds.

A decoder without rejection goes through the same test and fails it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import chi2

from nextlat_dist.inference import decoder as decoder_module
from nextlat_dist.inference.decoder import Decoder, load
from nextlat_dist.inference.sampling import Sampling, draw
from tests.inference.exports import BOS, random_predictor, random_weights, reference_model, tiny_config, write_export

VOCABULARY, LENGTH = 4, 3


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    predictor = random_predictor(8, width=8)
    return write_export(tmp_path_factory.mktemp("law"), config, random_weights(config, scale=0.4), predictor)


@torch.inference_mode()
def joint_law(export: Path, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The base model's law of LENGTH tokens behind BOS, from transformers' forward over every prefix."""
    model = reference_model(export, torch.float64)
    law: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH):
        p = sampling.probabilities(model(torch.tensor([[BOS, *tokens]])).logits[0])
        law[tokens] = float(torch.stack([p[i, token] for i, token in enumerate(tokens)]).prod())
    return law


def p_value(decoder: Decoder, law: dict[tuple[int, ...], float], sampling: Sampling, count: int) -> float:
    """Of the chi-square test of `count` continuations, at draft length 2; impossible outcomes give 0."""
    results = decoder.generate(
        [[BOS]] * count,
        max_new_tokens=LENGTH,
        draft_length=LENGTH - 1,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=20_000,
        ignore_eos=True,
    )
    accepted = sum(result.accepted for result in results) / sum(result.drafted for result in results)
    assert accepted > 0.1  # drafts matter
    seen = Counter(tuple(result.token_ids) for result in results)
    possible = {tokens: probability for tokens, probability in law.items() if probability > 0}
    if set(seen) - set(possible):
        return 0.0
    statistic = sum((seen[tokens] - count * p) ** 2 / (count * p) for tokens, p in possible.items())
    return float(chi2.sf(statistic, len(possible) - 1))


@pytest.mark.parametrize(
    ("sampling", "count"), [(Sampling(1.0), 20_000), (Sampling(0.6, top_k=3), 5_000), (Sampling(1.2, top_p=0.8), 5_000)]
)
def test_sampled_output_follows_the_base_model(export: Path, sampling: Sampling, count: int) -> None:
    law = joint_law(export, sampling)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-12)
    assert p_value(load(export, "cpu", torch.float64), law, sampling, count) > 0.01


def test_a_decoder_without_rejection_fails(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(
        p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int], uniforms: Sequence[float]
    ) -> tuple[int, int]:
        return len(drafted), draw(p[len(drafted)], uniforms[-1])

    monkeypatch.setattr(decoder_module, "verify_sampled", accept_all)
    law = joint_law(export, Sampling(1.0))
    assert p_value(load(export, "cpu", torch.float64), law, Sampling(1.0), 5_000) < 1e-6
