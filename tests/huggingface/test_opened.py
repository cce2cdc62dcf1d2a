"""An opened export is read once, and when something first asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.calibration.calibrate import calibrate
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface import opened as module
from nextlat_dist.huggingface.drafters.latent_predictor import PREDICTOR_DIRECTORY
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.inference.loading import decoder_of
from tests.kit.exports import (
    copying_model,
    random_predictor,
    random_weights,
    reference_model,
    tiny_config,
    write_export,
    write_tokenizer,
)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the readers that were called."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        reader = getattr(module, name)

        def read(*arguments: Any) -> Any:
            calls.append(name)
            return reader(*arguments)

        return read

    for name in ("load_base_weights", "weights_sha256", "find_drafter"):
        monkeypatch.setattr(module, name, counting(name))
    return calls


def test_nothing_is_read_before_it_is_asked_for_and_nothing_twice(tmp_path: Path, counted: list[str]) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    opened = open_export(tmp_path)
    assert counted == []
    assert opened.config.vocab_size == config.vocab_size
    assert opened.special_tokens.bos == config.bos_token_id
    assert counted == []
    for _ in range(2):
        decoder = decoder_of(opened)
        assert decoder.drafter is not None
    assert sorted(counted) == ["find_drafter", "load_base_weights", "weights_sha256"]


def test_calibrating_opens_the_export_once(tmp_path: Path, text_dataset: Path, counted: list[str]) -> None:
    (tmp_path / "export").mkdir()
    write_tokenizer(tmp_path / "export")
    config = tiny_config(vocab_size=640, hidden_size=64)
    export = write_export(tmp_path / "export", config, *copying_model(config))
    (tmp_path / "code.txt").write_text("return self")
    calibrate(
        export,
        [tmp_path / "code.txt"],
        temperatures=[0.0],
        batch_sizes=[1],
        max_new_tokens=20,
        progress=False,
        draft_vocabulary=600,
        data=text_dataset / "train",
    )
    assert sorted(counted) == ["find_drafter", "load_base_weights", "weights_sha256"]


def test_a_changed_draft_vocabulary_is_that_of_the_opened_export(tmp_path: Path) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    opened = open_export(tmp_path)
    for ids in (torch.tensor([2, 5, 7]), None):
        opened.set_draft_vocabulary(ids)
        for seen in (opened, open_export(tmp_path)):
            assert seen.drafter is not None
            vocabulary = seen.drafter.draft_vocabulary
            assert (vocabulary is None) if ids is None else torch.equal(vocabulary, ids)
    assert (tmp_path / PREDICTOR_DIRECTORY / "model.safetensors").is_file()


def test_what_is_no_export_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not an export: it has no model\.safetensors.index\.json"):
        open_export(tmp_path)


def test_a_directory_without_a_configuration_is_no_export(tmp_path: Path) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"is not an export: it has no config\.json; write one with"):
        open_export(tmp_path)


def test_a_single_file_without_an_index_is_read(tmp_path: Path) -> None:
    """As most small Llamas are published."""
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    with_index = decoder_of(open_export(tmp_path)).generate([[1, 5, 9]], max_new_tokens=8)[0].token_ids
    (tmp_path / "model.safetensors.index.json").unlink()
    assert decoder_of(open_export(tmp_path)).generate([[1, 5, 9]], max_new_tokens=8)[0].token_ids == with_index


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), None)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"weights in pickles \(\*\.bin\) are never opened"):
        open_export(tmp_path)


def test_a_tied_model_keeps_its_embedding_whatever_head_lies_there(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    weights = random_weights(config)
    write_export(tmp_path, config, {**weights, "lm_head.weight": torch.zeros(31, 32)}, None)
    llama = decoder_of(open_export(tmp_path)).llama
    assert torch.equal(llama.head_weight, weights["model.embed_tokens.weight"])


def test_a_norm_of_another_epsilon_gives_other_states(tmp_path: Path) -> None:
    """`rms_norm_eps` of the stored configuration is the one that the decoder computes with."""
    found = []
    for epsilon in (1e-5, 0.5):
        config = tiny_config(rms_norm_eps=epsilon)
        export = write_export(tmp_path / str(epsilon), config, random_weights(config, scale=0.05), None)
        llama = decoder_of(open_export(export), dtype=torch.float64).llama
        cache = llama.new_cache(1, 4)
        logits = llama.logits(llama.forward(torch.tensor([1, 7, 9]), [3], cache))
        theirs = reference_model(export, torch.float64)(torch.tensor([[1, 7, 9]])).logits[0]
        torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-9)
        found.append(logits)
    assert (found[0] - found[1]).abs().max() > 0.01
