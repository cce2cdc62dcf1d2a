"""The predictor against a straight transcription of its formula, and the order in which a draft walks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.export.layout import save_base_weights
from nextlat_dist.inference.decoder import Decoder, load
from nextlat_dist.inference.sampling import Sampling, draw
from tests.inference.exports import random_predictor, random_weights, tiny_config, write_export


def transcription(decoder: Decoder, predictor: dict[str, torch.Tensor], h: torch.Tensor, token: int) -> torch.Tensor:
    """h + linear_out(gelu(linear_mid(gelu(linear_in(LayerNorm([h, e(x)])))))) in float64, for h [hidden]."""
    w = {name: tensor.double() for name, tensor in predictor.items()}
    x = torch.cat([h, decoder.llama.embedding[token]])
    x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * w["layer_norm.weight"] + w["layer_norm.bias"]

    def gelu(z: torch.Tensor) -> torch.Tensor:
        return z * (1 + torch.erf(z / 2**0.5)) / 2

    return h + w["linear_out.weight"] @ gelu(w["linear_mid.weight"] @ gelu(w["linear_in.weight"] @ x))


@pytest.fixture
def predictor() -> dict[str, torch.Tensor]:
    return random_predictor(32)


@pytest.fixture
def decoder(tmp_path: Path, predictor: dict[str, torch.Tensor]) -> Decoder:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), predictor)
    return load(tmp_path, "cpu", torch.float64)


def test_a_draft_rolls_the_state_with_the_token_it_just_drew(
    decoder: Decoder, predictor: dict[str, torch.Tensor]
) -> None:
    h = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    head = decoder.llama.logits(torch.eye(32, dtype=torch.float64)).t()
    for sampling in (Sampling(0.0), Sampling(0.8, top_k=9)):
        uniforms = [0.3, 0.9, 0.5, 0.1]
        assert decoder.predictor is not None
        drafted = decoder.predictor.draft(h[None], 7, sampling, uniforms)
        state, token = h, 7
        for position, uniform in enumerate(uniforms):
            state = transcription(decoder, predictor, state, token)
            logits = head @ state
            if sampling.greedy:
                token = int(logits.argmax())
            else:
                assert drafted.probabilities is not None
                q = sampling.probabilities(logits)
                torch.testing.assert_close(drafted.probabilities[position], q, rtol=1e-10, atol=1e-12)
                token = draw(q, uniform)
            assert drafted.tokens[position] == token
        assert sampling.greedy == (drafted.probabilities is None)


def test_an_empty_draft_leaves_the_predictor_alone(decoder: Decoder) -> None:
    assert decoder.predictor is not None
    drafted = decoder.predictor.draft(torch.zeros(1, 32, dtype=torch.float64), 7, Sampling(1.0), [])
    assert drafted.tokens == []
    assert drafted.probabilities is None


def test_predictor_of_other_base_weights_is_refused(tmp_path: Path, predictor: dict[str, torch.Tensor]) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), predictor)
    save_base_weights(tmp_path, random_weights(config, seed=9))
    with pytest.raises(UserError, match="belongs to base weights"):
        load(tmp_path)
