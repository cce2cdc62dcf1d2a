"""The predictor against a straight transcription of its formula, and the order in which a draft walks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import save_base_weights
from nextlat_dist.huggingface.drafters.latent_predictor import save_draft_vocabulary
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.loading import load
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export


def transcription(
    decoder: Decoder, predictor: dict[str, torch.Tensor], h: torch.Tensor, token: int, epsilon: float = 1e-5
) -> torch.Tensor:
    """h + linear_out(gelu(linear_mid(gelu(linear_in(LayerNorm([h, e(x)])))))) in float64, for h [hidden]."""
    w = {name: tensor.double() for name, tensor in predictor.items()}
    x = torch.cat([h, decoder.llama.embedding[token]])
    x = (x - x.mean()) / (x.var(unbiased=False) + epsilon).sqrt() * w["layer_norm.weight"] + w["layer_norm.bias"]

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


def test_a_draft_rolls_the_state_with_the_token_before_it(decoder: Decoder, predictor: dict[str, torch.Tensor]) -> None:
    states = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    head = decoder.llama.logits(torch.eye(32, dtype=torch.float64)).t()
    assert decoder.drafter is not None
    memory = decoder.drafter.start(3, 10)
    memory.begin(states)
    expected = list(states)
    rows = [0, 1, 2]
    for tokens, going in [([7, 3, 9], [0, 1, 2]), ([5, 5, 1], [0, 1, 2]), ([2, 4], [0, 2]), ([6], [2])]:
        kept = None if len(going) == len(rows) else torch.tensor([rows.index(row) for row in going])
        logits = memory.logits(torch.tensor(tokens), kept)
        rows = going
        for place, row in enumerate(rows):
            expected[row] = transcription(decoder, predictor, expected[row], tokens[place])
            torch.testing.assert_close(logits[place], head @ expected[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_the_epsilon_of_the_norm_is_the_exports(
    epsilon: float, tmp_path: Path, predictor: dict[str, torch.Tensor]
) -> None:
    """States whose variance is near 1e-5 or 0.5, so that any other epsilon shows."""
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), predictor, epsilon)
    decoder = load(tmp_path, "cpu", torch.float64)
    decoder.llama.embedding.mul_(epsilon**0.5)
    drafter = decoder.drafter
    assert drafter is not None
    memory = drafter.start(1, 4)
    state = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * epsilon**0.5
    memory.begin(state[None])
    logits = memory.logits(torch.tensor([7]), None)
    head = decoder.llama.logits(torch.eye(32, dtype=torch.float64)).t()
    expected = head @ transcription(decoder, predictor, state, 7, epsilon)
    torch.testing.assert_close(logits[0], expected, rtol=1e-10, atol=1e-12)
    for other in (epsilon / 10, epsilon * 10):
        assert not torch.allclose(logits[0], head @ transcription(decoder, predictor, state, 7, other), rtol=1e-3)


def test_a_draft_vocabulary_is_rows_of_the_head(
    tmp_path: Path, decoder: Decoder, predictor: dict[str, torch.Tensor]
) -> None:
    ids = torch.tensor([0, 2, 3, 11, 30])
    save_draft_vocabulary(tmp_path, ids)
    reduced = load(tmp_path, "cpu", torch.float64).drafter
    assert reduced is not None
    assert decoder.drafter is not None
    h = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = []
    for drafter in (decoder.drafter, reduced):
        memory = drafter.start(2, 10)
        memory.begin(h)
        logits.append(memory.logits(torch.tensor([4, 8]), None))
    assert decoder.drafter.vocabulary is None
    assert reduced.vocabulary is not None
    assert reduced.vocabulary.tolist() == ids.tolist()
    torch.testing.assert_close(logits[1], logits[0][:, ids])


def test_predictor_of_other_base_weights_is_refused(tmp_path: Path, predictor: dict[str, torch.Tensor]) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), predictor)
    save_base_weights(tmp_path, random_weights(config, seed=9))
    with pytest.raises(UserError, match="belongs to base weights"):
        load(tmp_path)
