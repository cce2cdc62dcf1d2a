"""What travels through the layer list: rows of tokens, and what an objective is called with.

Between layers travels `(hidden, rows)`: `hidden` is [s, b, h], `rows` is an integer tensor [b, s + 1, 4] that carries
token, document number (-1 on padding), loss mask and label of every position, so that every pipeline stage has what it
needs and a pipeline message holds exactly one tensor with a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TOKEN, DOCUMENT, LOSS_MASK, LABEL = 0, 1, 2, 3  # last dimension of `rows`


def pack_rows(
    tokens: torch.Tensor, document_ids: torch.Tensor, loss_mask: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """[b, s + 1] each -> rows [b, s + 1, 4] (int64); the label, what is predicted instead of a token, is the token
    itself where none are given.
    """
    labels = tokens if labels is None else labels
    return torch.stack([tokens.long(), document_ids.long(), loss_mask.long(), labels.long()], dim=-1)


class ObjectiveInputs(NamedTuple):
    """What the last layer of the list is called with."""

    hidden: torch.Tensor  # final hidden states h [s, b, h]
    rows: torch.Tensor
    embedded: torch.Tensor | None = None  # e(x) [s, b, h], for objectives that read the embedding
    tied_weight: torch.Tensor | None = None  # the embedding's weight [vocab (local), h], where the head is tied to it
