"""The reduced draft vocabulary: which ids it holds, where it is stored, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import load_base_weights, weights_sha256
from nextlat_dist.huggingface.draft_vocabulary import (
    TokenCounts,
    count_dataset,
    count_run_data,
    coverage,
    most_frequent,
)
from nextlat_dist.huggingface.drafters.latent_predictor import (
    PREDICTOR_DIRECTORY,
    load_predictor,
    save_draft_vocabulary,
)
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export
from tests.kit.training.runs import training_config

VOCAB_SIZE = 600  # of `text_dataset`


def load_draft_vocabulary(export: Path) -> torch.Tensor | None:
    predictor = load_predictor(export, weights_sha256(load_base_weights(export)))
    assert predictor is not None
    return predictor.draft_vocabulary


@pytest.fixture
def export(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_export(tmp_path / "export", config, random_weights(config), random_predictor(32))


def test_the_most_frequent_ids_and_eos_in_ascending_order() -> None:
    counted = TokenCounts(np.array([5, 0, 0, 9, 7, 7, 1]), frozenset({2}))
    assert most_frequent(counted, 2).tolist() == [2, 3]
    assert most_frequent(counted, 3).tolist() == [2, 3, 4]  # a tie goes to the lower id
    assert most_frequent(counted, 5).tolist() == [0, 2, 3, 4, 5]
    assert coverage(counted, most_frequent(counted, 3)) == pytest.approx(16 / 29)


@pytest.mark.parametrize("size", [-1, 1, 7, 8])
def test_a_size_that_reduces_nothing_is_refused(size: int) -> None:
    counted = TokenCounts(np.ones(7, np.int64), frozenset({2}))
    with pytest.raises(UserError, match=f"draft_vocabulary is {size}.*less than the vocabulary of 7 ids"):
        most_frequent(counted, size)


def test_a_dataset_is_counted_once(text_dataset: Path) -> None:
    counted = count_dataset(text_dataset / "train", VOCAB_SIZE)
    place = open_storage(text_dataset / "train")
    manifest = read_manifest(place)
    storage = Records(place, manifest)
    stored = np.concatenate([storage.read(number).tokens for number in range(len(storage))])
    whole_rows = stored[: len(stored) // 1024 * 1024]
    np.testing.assert_array_equal(counted.counts, np.bincount(whole_rows, minlength=VOCAB_SIZE))
    assert counted.always == {manifest.tokenizer.eos_id}


def run_config(text_dataset: Path, **data: Any) -> Any:
    raw = training_config(Path("unused"), text_dataset, {}, {})
    raw["data"] = {**raw["data"], **data}
    return config_from_dict(raw)


def test_a_run_is_counted_as_it_trained(text_dataset: Path) -> None:
    """Weights decide: a source without a share counts for nothing; padding is no token."""
    train, validation = str(text_dataset / "train"), str(text_dataset / "validation")
    sources = [
        {"name": "other", "path": train, "weight": 0.0},
        {"name": "train", "path": validation, "weight": 1.0},  # named as a dataset given alone: its order is the same
    ]
    mixed, alone, other = (
        count_run_data(run_config(text_dataset, **data)).counts
        for data in ({"train": None, "sources": sources}, {"train": validation}, {"train": train})
    )
    np.testing.assert_array_equal(mixed, alone)
    assert not np.array_equal(alone, other)
    rows, length = 4, 900  # one step; longer than every document
    padded = count_run_data(run_config(text_dataset, packing="pad", sequence_length=length)).counts
    bos = read_manifest(open_storage(text_dataset / "train")).tokenizer.bos_id
    assert padded[bos] == rows
    assert rows < padded.sum() < rows * length


def test_it_is_stored_next_to_the_predictor_replaced_and_removed(export: Path) -> None:
    assert load_draft_vocabulary(export) is None  # as in an export of an older release
    calibration = export / PREDICTOR_DIRECTORY / "calibration.json"
    for ids in ([0, 3, 30], [2, 5]):
        calibration.write_text("{}")
        save_draft_vocabulary(export, torch.tensor(ids))
        loaded = load_draft_vocabulary(export)
        assert loaded is not None
        assert loaded.tolist() == ids
        assert not calibration.exists()  # it was measured with other drafts
    calibration.write_text("{}")
    save_draft_vocabulary(export, None)
    assert load_draft_vocabulary(export) is None
    assert sorted(path.name for path in (export / PREDICTOR_DIRECTORY).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([3, 2]),
        torch.tensor([2, 2]),
        torch.tensor([-1, 2]),
        torch.tensor([2, 31]),
        torch.tensor([[2, 3]]),
        torch.tensor([2.0, 3.0]),
        torch.tensor([], dtype=torch.int64),
        torch.arange(31),
    ],
)
def test_a_damaged_one_is_refused(export: Path, ids: torch.Tensor) -> None:
    save_file({"draft_vocabulary": ids}, export / PREDICTOR_DIRECTORY / "draft_vocabulary.safetensors")
    with pytest.raises(UserError, match="ascending list of some of the 31 token ids"):
        load_draft_vocabulary(export)
