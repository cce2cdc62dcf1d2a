"""Make rows of tokens from documents: `concat` cuts the stream into full rows, `pad` gives every document its own row.

Invariant: whether a token is a training target depends on its place in its *document* alone, so a document that goes on
in the next row keeps its mask. The first token of a document and its prompt are never targets; padding never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextlat_dist.data.shard_format import Record


@dataclass(frozen=True)
class RowBatch:
    """Rows of tokens, C-contiguous.

    Attributes:
        tokens: int32 [rows, sequence_length + 1].
        document_ids: int32 [rows, sequence_length + 1]; number of the document inside its row (0, 1, 2…), -1 on
            padding.
        loss_mask: bool [rows, sequence_length + 1]; True where this token is a training target: no padding, and its
            index inside its document is at least max(prompt length, 1).
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Block:
    """A record with its documents in the order of one epoch.

    Attributes:
        tokens: [tokens], as stored.
        starts: bool [tokens], True on the first token of a document.
        targets: bool [tokens], True where a token may be a training target.
        ends: int64 [documents], cumulative and exclusive.
    """

    tokens: np.ndarray
    starts: np.ndarray
    targets: np.ndarray
    ends: np.ndarray


def arrange(record: Record, order: np.ndarray | None) -> Block:
    """The documents of a record in `order` (int64 [documents], None for as stored)."""
    lengths, prompts, tokens = record.lengths, record.prompts, record.tokens
    if order is not None:
        old_first = (record.ends - lengths)[order]
        lengths = lengths[order]
        prompts = None if prompts is None else prompts[order]
        new_first = np.cumsum(lengths) - lengths
        tokens = tokens[np.repeat(old_first - new_first, lengths) + np.arange(len(tokens))]
    ends = np.cumsum(lengths)
    starts = np.zeros(len(tokens), bool)
    starts[ends - lengths] = True
    if prompts is None:
        targets = ~starts
    else:
        masked = np.maximum(prompts, 1)
        targets = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths) >= np.repeat(masked, lengths)
    return Block(tokens, starts, targets, ends)


def concat_rows(pieces: Sequence[tuple[Block, int, int]], row_tokens: int) -> RowBatch:
    """Rows of `row_tokens` consecutive tokens of the pieces (block, first token, end), which fill whole rows."""
    tokens = np.concatenate([block.tokens[begin:end] for block, begin, end in pieces], dtype=np.int32)
    targets = np.concatenate([block.targets[begin:end] for block, begin, end in pieces])
    starts = np.concatenate([block.starts[begin:end] for block, begin, end in pieces]).reshape(-1, row_tokens)
    # A row's first token opens its document 0, whether or not the document began in an earlier row.
    starts[:, 0] = False
    return RowBatch(
        tokens.reshape(-1, row_tokens), np.cumsum(starts, axis=1, dtype=np.int32), targets.reshape(-1, row_tokens)
    )


def pad_rows(pieces: Sequence[tuple[Block, int, int]], row_tokens: int, pad_id: int) -> tuple[RowBatch, int]:
    """One row per document of the pieces (block, first document, end), and how many had to be cut to `row_tokens`."""
    rows = sum(end - begin for _, begin, end in pieces)
    tokens = np.full((rows, row_tokens), pad_id, np.int32)
    document_ids = np.full((rows, row_tokens), -1, np.int32)
    loss_mask = np.zeros((rows, row_tokens), bool)
    row = truncated = 0
    for block, begin, end in pieces:
        for document in range(begin, end):
            first = int(block.ends[document - 1]) if document else 0
            length = int(block.ends[document]) - first
            truncated += length > row_tokens
            kept = min(length, row_tokens)
            tokens[row, :kept] = block.tokens[first : first + kept]
            document_ids[row, :kept] = 0
            loss_mask[row, :kept] = block.targets[first : first + kept]
            row += 1
    return RowBatch(tokens, document_ids, loss_mask), truncated
