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


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors.index.json"])
def test_a_directory_without_one_of_its_files_is_no_export(tmp_path: Path, missing: str) -> None:
    config = tiny_config()
    write_export(tmp_path, config, random_weights(config), random_predictor(32))
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"is not an export: it has no {missing}; write one with"):
        open_export(tmp_path)
