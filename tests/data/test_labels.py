"""Labels: what is predicted in a token's place moves with the token, and stands for it where a record has none."""

from __future__ import annotations

import dataclasses
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.loader import RowLoader, Source
from nextlat_dist.data.packing import arrange, batch_digest, concat_rows, pad_rows
from nextlat_dist.data.shard_format import Record
from nextlat_dist.errors import UserError
from tests.kit.datasets import write_dataset

RECORD = Record(
    tokens=np.array([1, 50, 51, 2, 1, 60, 1, 70, 71, 72, 73, 2], np.uint16),
    ends=np.array([4, 6, 12], np.int64),
    labels=np.array([1, 10, 11, 12, 1, 20, 1, 30, 31, 32, 33, 34], np.uint16),
)
PLAIN = Record(np.array([1, 80, 2], np.uint16), np.array([3], np.int64))


def test_labels_move_with_their_tokens() -> None:
    block = arrange([RECORD, PLAIN], np.array([2, 3, 0, 1]))
    assert block.tokens.tolist() == [1, 70, 71, 72, 73, 2, 1, 80, 2, 1, 50, 51, 2, 1, 60]
    assert block.targets.tolist() == [1, 30, 31, 32, 33, 34, 1, 80, 2, 1, 10, 11, 12, 1, 20]
    assert arrange([PLAIN, RECORD], None).targets[:5].tolist() == [1, 80, 2, 1, 10]


def test_rows_of_concat_hold_the_labels_of_their_tokens() -> None:
    labelled, plain = arrange([RECORD], None), arrange([PLAIN], None)
    batch = concat_rows([(labelled, 5, 12), (plain, 0, 3), (plain, 3, 5)], 4, pad_id=9)
    assert batch.tokens.tolist() == [[60, 1, 70, 71], [72, 73, 2, 1], [80, 2, 9, 9]]
    assert batch.targets.tolist() == [[20, 1, 30, 31], [32, 33, 34, 1], [80, 2, 9, 9]]
    assert batch.targets.dtype == np.int32
    assert concat_rows([(plain, 0, 3)], 3, 0).labels is None


def test_rows_of_pad_hold_the_labels_of_their_tokens() -> None:
    labelled, plain = arrange([RECORD], None), arrange([PLAIN], None)
    batch, truncated = pad_rows([(labelled, 1, 3), (plain, 0, 2)], 5, pad_id=9)
    assert truncated == 1
    assert batch.targets.tolist() == [[1, 20, 9, 9, 9], [1, 30, 31, 32, 33], [1, 80, 2, 9, 9], [9] * 5]
    assert batch.targets.dtype == np.int32
    assert pad_rows([(plain, 0, 1)], 3, 0)[0].labels is None


def test_a_record_with_labels_comes_back_from_its_members() -> None:
    back = Record.from_members(RECORD.members())
    assert back.labels is not None
    assert RECORD.labels is not None
    assert back.labels.dtype == np.uint16
    assert back.labels.tolist() == RECORD.labels.tolist()
    assert Record.from_members(PLAIN.members()).labels is None


@pytest.mark.parametrize("labels", [np.zeros(11, np.uint16), np.zeros(12, np.uint32)])
def test_labels_of_another_shape_or_type_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="labels are uint"):
        Record(RECORD.tokens, RECORD.ends, labels=labels)


def test_labels_count_in_the_digest_of_a_row_where_they_are_not_its_tokens() -> None:
    batch, _ = pad_rows([(arrange([RECORD], None), 0, 3)], 6, pad_id=0)
    assert batch.labels is not None
    parts = [batch.tokens, batch.document_ids, batch.loss_mask, batch.labels]
    without = [sha256(b"".join(part[row].tobytes() for part in parts[:3])).digest() for row in range(3)]
    assert dataclasses.replace(batch, labels=None).row_digests() == without
    assert dataclasses.replace(batch, labels=batch.tokens).row_digests() == without
    assert batch.row_digests() == [sha256(b"".join(part[row].tobytes() for part in parts)).digest() for row in range(3)]


FIRST_LABELLED, APART = 20_000, 30_000  # ids of documents with labels, and how far each label is from its token


def _mixture(directory: Path) -> list[Source]:
    """A dataset with labels and one without; the ids say which, and what the label is."""
    generator = np.random.default_rng(0)
    plain, labelled = (
        [first + generator.integers(0, 1000, length) for length in generator.integers(5, 40, 30)]
        for first in (10_000, FIRST_LABELLED)
    )
    write_dataset(directory / "plain", plain)
    write_dataset(directory / "labelled", labelled, labels=[document + APART for document in labelled])
    return [Source("plain", directory / "plain", 0.6), Source("labelled", directory / "labelled", 0.4)]


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_rows_of_a_mixture_hold_the_labels_of_their_own_source(packing: Any, tmp_path: Path) -> None:
    sources, found = _mixture(tmp_path), []
    for size, workers in ((1, 0), (1, 1), (2, 0), (2, 1), (8, 0)):
        ranks = [
            RowLoader(
                sources,
                sequence_length=15,
                packing=packing,
                global_batch_size=8,
                seed=3,
                shuffle=True,
                data_parallel_rank=rank,
                data_parallel_size=size,
                workers=workers,
            )
            for rank in range(size)
        ]
        digests, kinds = [], set()
        for _ in range(12):
            batches = [each.next_batch() for each in ranks]
            for batch in batches:
                labelled = batch.tokens >= FIRST_LABELLED
                kinds |= set(labelled.any(axis=1).tolist())
                np.testing.assert_array_equal(batch.targets, batch.tokens + APART * labelled)
            digests.append(batch_digest([digest for batch in batches for digest in batch.row_digests()]))
        assert kinds == {True, False}
        found.append(digests)
        for each in ranks:
            each.close()
    assert all(digests == found[0] for digests in found)  # however a rank's rows happen to be of one source alone


def test_a_label_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path) -> None:
    tokens = np.arange(10, 30)
    write_dataset(tmp_path, [tokens], labels=[tokens + 59_970])  # 59_999 is the last id
    options: dict[str, Any] = {"sequence_length": 19, "packing": "concat", "global_batch_size": 1, "seed": 0}
    options |= {"shuffle": False, "data_parallel_rank": 0, "data_parallel_size": 1}
    assert RowLoader(tmp_path, **options).next_batch().targets.max() == 59_999
    write_dataset(tmp_path / "more", [tokens], labels=[tokens + 59_971])
    with pytest.raises(UserError, match=r"train-000000.* holds token id 60000, but the vocabulary has 60000 ids; set"):
        RowLoader(tmp_path / "more", **options).next_batch()
