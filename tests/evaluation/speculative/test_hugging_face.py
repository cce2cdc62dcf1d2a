"""The outside reference writes what the decoder writes, and counts its forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextlat_dist.evaluation.speculative.hugging_face import HuggingFace
from nextlat_dist.inference.loading import load
from tests.kit.exports import random_weights, tiny_config, write_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every id is an EOS."""
    config = tiny_config(eos_token_id=list(range(31)))
    return write_export(tmp_path_factory.mktemp("export"), config, random_weights(config), None)


@pytest.mark.parametrize("lookup", [False, True])
def test_greedy_tokens_and_forwards(export: Path, lookup: bool) -> None:
    prompt = [4, 9, 4, 9, 4, 9]
    reference = HuggingFace(export, torch.device("cpu"), torch.float64)
    run = reference.generate(prompt, max_new_tokens=40, temperature=0.0, seed=0, prompt_lookup=lookup)
    (result,) = run.generations
    expected = load(export, "cpu", torch.float64).generate([prompt], max_new_tokens=40, draft_length=0, ignore_eos=True)
    assert result.token_ids == expected[0].token_ids
    assert (result.cycles == 39) is not lookup
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0
    assert run.cpu_seconds is not None


def test_seeds_and_temperature(export: Path) -> None:
    reference = HuggingFace(export, torch.device("cpu"), torch.float32)

    def tokens(temperature: float, seed: int) -> list[int]:
        run = reference.generate([4], max_new_tokens=30, temperature=temperature, seed=seed, prompt_lookup=False)
        return run.generations[0].token_ids

    assert tokens(1.0, 1) == tokens(1.0, 1)
    assert tokens(1.0, 1) != tokens(1.0, 2)
    assert tokens(1e-4, 1) == tokens(1e-4, 2) == tokens(0.0, 3)
    assert len(tokens(5.0, 1)) == 30
