"""An export as a walker: what it expects is what transformers computes, and it drives as it expects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextlat_dist.evaluation.tasks.city.walker import ExportWalker
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import EOS_ID
from tests.kit.exports import random_weights, reference_model, tiny_config, write_export

HISTORIES = [[1, 5, 9], [1, 8, 7, 6, 5, 4, 11], [1, 4, 20, 6]]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(max_position_embeddings=8)
    return write_export(tmp_path_factory.mktemp("export"), config, random_weights(config), None)


def test_it_expects_what_transformers_computes(export: Path) -> None:
    model = reference_model(export, torch.float32)
    found = ExportWalker(ExportModel(export), context=12).log_probabilities(HISTORIES)
    assert [len(own) for own in found] == [3, 7, 4]
    for own, history in zip(found, HISTORIES, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([history])).logits[0].log_softmax(dim=-1)
        assert torch.from_numpy(own).allclose(expected, atol=1e-4)


def test_it_drives_as_it_expects_beyond_the_trained_context(export: Path) -> None:
    walker = ExportWalker(ExportModel(export), context=12)
    written = walker.continuations(HISTORIES, 5, temperature=0.0, seed=0)
    for history, tokens in zip(HISTORIES, written, strict=True):
        assert len(tokens) == 5 or tokens[-1] == EOS_ID
        read = walker.log_probabilities([[*history, *tokens]])[0]
        assert tokens == read[len(history) - 1 : -1].argmax(axis=1).tolist()
    sampled = [walker.continuations(HISTORIES, 5, temperature=1.0, seed=seed) for seed in (0, 0, 9)]
    assert sampled[0] == sampled[1] != sampled[2]
