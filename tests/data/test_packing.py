from __future__ import annotations

import numpy as np

from nextlat_dist.data.packing import arrange, concat_rows, pad_rows
from nextlat_dist.data.shard_format import Record

RECORD = Record(
    tokens=np.array([1, 50, 51, 2, 1, 60, 1, 70, 71, 72, 73, 2], np.uint16),
    ends=np.array([4, 6, 12], np.int64),
    prompts=np.array([1, 0, 4], np.int64),
)
WITHOUT_PROMPTS = Record(RECORD.tokens, RECORD.ends)


def test_arrange_moves_whole_documents_with_their_masks() -> None:
    block = arrange([RECORD], np.array([2, 0, 1]))
    assert block.tokens.tolist() == [1, 70, 71, 72, 73, 2, 1, 50, 51, 2, 1, 60]
    assert block.ends.tolist() == [6, 10, 12]
    batch = concat_rows([(block, 0, 12)], 12, 0)
    assert np.flatnonzero(~batch.loss_mask[0]).tolist() == [0, 1, 2, 3, 6, 10]
    assert batch.document_ids.tolist() == [[0] * 6 + [1] * 4 + [2] * 2]


def test_arrange_mixes_the_documents_of_several_records() -> None:
    """A record without prompts may stand next to one with prompts."""
    block = arrange([RECORD, WITHOUT_PROMPTS], np.array([5, 2, 0, 1, 4, 3]))
    long, first, short = [1, 70, 71, 72, 73, 2], [1, 50, 51, 2], [1, 60]
    assert block.tokens.tolist() == [*long, *long, *first, *short, *short, *first]
    assert block.ends.tolist() == [6, 12, 16, 18, 20, 24]
    batch, _ = pad_rows([(block, 0, 6)], 6, 0)
    assert batch.loss_mask.sum(axis=1).tolist() == [5, 2, 3, 1, 1, 3]


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    for record in (WITHOUT_PROMPTS, Record(RECORD.tokens, RECORD.ends, np.zeros(3, np.int64))):
        batch = concat_rows([(arrange([record], None), 0, 12)], 12, 0)
        assert np.flatnonzero(~batch.loss_mask[0]).tolist() == [0, 4, 6]


def test_concat_numbers_documents_in_each_row_and_keeps_masks_over_rows() -> None:
    block = arrange([RECORD], None)
    batch = concat_rows([(block, 1, 8), (block, 8, 11)], 5, 0)
    assert batch.tokens.tolist() == [[50, 51, 2, 1, 60], [1, 70, 71, 72, 73]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[True, True, True, False, True], [False, False, False, False, True]]
    # The third document continues after a row that ends inside its prompt: so does its mask.
    batch = concat_rows([(block, 6, 12)], 2, 0)
    assert batch.document_ids.tolist() == [[0, 0], [0, 0], [0, 0]]
    assert batch.loss_mask.tolist() == [[False, False], [False, False], [True, True]]


def test_pad_gives_a_row_to_each_document_and_cuts_long_ones() -> None:
    block = arrange([RECORD], None)
    batch, truncated = pad_rows([(block, 0, 2), (block, 2, 3)], 5, pad_id=9)
    assert truncated == 1
    assert batch.tokens.tolist() == [[1, 50, 51, 2, 9], [1, 60, 9, 9, 9], [1, 70, 71, 72, 73]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0, -1], [0, 0, -1, -1, -1], [0] * 5]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]


def test_what_a_block_lost_keeps_its_place_as_padding() -> None:
    """Tokens 12 to 16 and documents 3 and 4 of the block could not be read."""
    block = arrange([RECORD], None)
    batch = concat_rows([(block, 10, 17), (block, 0, 5)], 4, 9)
    assert batch.tokens.tolist() == [[73, 2, 9, 9], [9, 9, 9, 1], [50, 51, 2, 1]]
    assert batch.document_ids.tolist() == [[0, 0, -1, -1], [-1, -1, -1, 0], [0, 0, 0, 1]]
    assert batch.loss_mask.astype(int).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    batch = concat_rows([(block, 13, 15)], 2, 9)
    assert (batch.tokens.tolist(), batch.document_ids.tolist()) == ([[9, 9]], [[-1, -1]])
    batch, truncated = pad_rows([(block, 2, 5), (arrange([], None), 0, 1)], 3, pad_id=9)
    assert (batch.tokens.tolist(), truncated) == ([[1, 70, 71], [9] * 3, [9] * 3, [9] * 3], 1)
    assert batch.document_ids.tolist() == [[0] * 3, [-1] * 3, [-1] * 3, [-1] * 3]
    assert not batch.loss_mask.any()


def test_rows_have_the_promised_types() -> None:
    block = arrange([RECORD], np.array([1, 0, 2]))
    for batch in (concat_rows([(block, 0, 12)], 4, 0), pad_rows([(block, 0, 3)], 4, 0)[0]):
        kinds = [array.dtype for array in (batch.tokens, batch.document_ids, batch.loss_mask)]
        assert kinds == [np.int32, np.int32, np.bool_]
        assert all(
            a.flags.c_contiguous and a.shape == (3, 4) for a in (batch.tokens, batch.document_ids, batch.loss_mask)
        )
