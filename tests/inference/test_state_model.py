"""An export's hidden states and predictor, against transformers' own model and the transcribed equation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.inference import state_model as module
from nextlat_dist.inference.state_model import ExportModel
from tests.kit.exports import random_predictor, random_weights, reference_model, tiny_config, write_export
from tests.kit.reference import predict

HIDDEN = 32


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(max_position_embeddings=16)
    return write_export(
        tmp_path_factory.mktemp("model") / "export", config, random_weights(config), random_predictor(HIDDEN)
    )


def some_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 31, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 9, 16, 40])
def test_states_and_logits_are_those_of_transformers_at_any_length(export: Path, length: int) -> None:
    tokens = some_tokens(3, length)
    model = ExportModel(export, "cpu", torch.float64)
    with torch.inference_mode():
        expected = reference_model(export, torch.float64)(tokens, output_hidden_states=True)
    states = model.states(tokens)
    assert torch.allclose(states, expected.hidden_states[-1], atol=1e-10)
    assert torch.allclose(model.logits(states), expected.logits, atol=1e-10)
    assert torch.allclose(model.states(tokens[:, :1]), states[:, :1])  # short ones again, after long ones


def test_rows_in_chunks_are_rows_together(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = some_tokens(7, 10)
    model = ExportModel(export, "cpu", torch.float64)
    together = model.states(tokens)
    monkeypatch.setattr(module, "CHUNK_TOKENS", 25)
    assert torch.allclose(model.states(tokens), together, atol=1e-12)


def test_advance_is_the_predictor_of_the_method(export: Path) -> None:
    model = ExportModel(export, "cpu", torch.float64)
    tokens = some_tokens(2, 4)
    states = model.states(tokens)
    weights = {f"latent_predictor.{name}": tensor.double() for name, tensor in random_predictor(HIDDEN).items()}
    found = model.advance(states[:, :-1], tokens[:, 1:])
    for row in range(2):
        for t in range(3):
            expected = predict(states[row, t], model.embedding[tokens[row, t + 1]], weights)
            assert torch.allclose(found[row, t], expected, atol=1e-10)


def test_an_export_without_a_predictor_has_states_only(tmp_path: Path) -> None:
    config = tiny_config()
    model = ExportModel(write_export(tmp_path / "gpt", config, random_weights(config), None), "cpu")
    assert (model.vocab_size, model.hidden_size, model.has_predictor) == (31, HIDDEN, False)
    states = model.states(some_tokens(2, 5))
    assert states.dtype == torch.float32
    with pytest.raises(UserError, match="no latent predictor"):
        model.advance(states, some_tokens(2, 5))
