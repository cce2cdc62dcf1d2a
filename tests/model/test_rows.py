"""Counts of a batch: real tokens, and how many keys they attend to."""

from __future__ import annotations

import pytest
import torch

from nextlat_dist.model.attention import document_attention_mask
from nextlat_dist.model.rows import Batch
from tests.kit import jobs


def test_attended_keys_by_hand() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, -1, -1, -1, -1]])  # the last column is only predicted
    batch = Batch.of(torch.zeros_like(documents), documents, documents >= 0)
    assert int(batch.attended) == (1 + 2 + 3) + (1 + 2) + (1 + 2)
    assert int(batch.real_tokens) == 8


@pytest.mark.parametrize("seed", range(4))
def test_attended_keys_are_those_of_the_mask(seed: int) -> None:
    batch = jobs.ragged_rows(8, seed=seed)
    mask = document_attention_mask(batch.input_documents)[:, 0]  # [b, s, s]; padding attends to padding there
    assert int(batch.attended) == int(mask[batch.input_documents >= 0].sum())
