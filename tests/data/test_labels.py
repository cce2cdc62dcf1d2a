"""Labels: what is predicted in a token's place moves with the token, and stands for it where a record has none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from nextlat_dist.data.packing import arrange, concat_rows, pad_rows
from nextlat_dist.data.shard_format import Record

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
    same = dataclasses.replace(batch, labels=batch.tokens)
    without = dataclasses.replace(batch, labels=None)
    assert same.row_digests() == without.row_digests()
    assert all(a != b for a, b in zip(batch.row_digests(), without.row_digests(), strict=True))
