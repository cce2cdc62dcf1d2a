"""Make rows of tokens from documents: `concat` cuts the stream into full rows, `pad` gives every document its own row.

Invariant: whether a token is a training target depends on its position in its *document* alone, so one that goes over
to the next row keeps its mask. The first token of a document and its prompt are never targets; padding never is. Units
that could not be read are padding of the same length: what comes after them does not move.
"""

from __future__ import annotations

import hashlib
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
        labels: int32 [rows, sequence_length + 1], what is predicted instead of each token, or None for the tokens.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    loss_mask: np.ndarray
    labels: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray:
        """`labels`, or the tokens themselves."""
        return self.tokens if self.labels is None else self.labels

    def row_digests(self) -> list[bytes]:
        """SHA-256 of each row's tokens, document ids, loss mask and, where they are not its tokens, labels."""
        tokens, labels = self.tokens.astype("<i4"), self.targets.astype("<i4")
        rows = zip(tokens, self.document_ids.astype("<i4"), self.loss_mask, labels, strict=True)
        parts = [row if (row[0] != row[3]).any() else row[:3] for row in rows]
        return [hashlib.sha256(b"".join(part.tobytes() for part in row)).digest() for row in parts]


def batch_digest(row_digests: Sequence[bytes]) -> str:
    """SHA-256 of a global batch from its rows' digests: the same for every number of ranks."""
    return hashlib.sha256(b"".join(row_digests)).hexdigest()


@dataclass(frozen=True)
class ArrangedDocuments:
    """The documents of a window in the order of one epoch.

    Attributes:
        tokens: [tokens], as stored.
        ends: int64 [documents], cumulative and exclusive.
        masked: int64 [documents], leading tokens of each that are never a training target, or None for one each.
        labels: as tokens, what is predicted instead of them, or None for the tokens themselves.
    """

    tokens: np.ndarray
    ends: np.ndarray
    masked: np.ndarray | None
    labels: np.ndarray | None = None

    @property
    def targets(self) -> np.ndarray:
        """`labels`, or the tokens themselves."""
        return self.tokens if self.labels is None else self.labels


def arrange(records: Sequence[Record], order: np.ndarray | None) -> ArrangedDocuments:
    """The documents of some records in `order` (int64 [documents], None for as stored)."""
    if not records:
        return ArrangedDocuments(np.empty(0, np.uint16), np.empty(0, np.int64), None)
    tokens = records[0].tokens if len(records) == 1 else np.concatenate([record.tokens for record in records])
    lengths = records[0].lengths if len(records) == 1 else np.concatenate([record.lengths for record in records])
    masked = None
    if any(record.prompts is not None for record in records):
        ones = [np.ones(len(r.ends), np.int64) if r.prompts is None else np.maximum(r.prompts, 1) for r in records]
        masked = np.concatenate(ones)
    labels = None
    if any(record.labels is not None for record in records):
        labels = np.concatenate([r.tokens if r.labels is None else r.labels for r in records])
    if order is not None:
        ends = np.cumsum(lengths)
        bounds = list(zip((ends - lengths)[order].tolist(), ends[order].tolist(), strict=True))
        tokens = np.concatenate([tokens[begin:end] for begin, end in bounds])
        labels = None if labels is None else np.concatenate([labels[begin:end] for begin, end in bounds])
        lengths = lengths[order]
        masked = None if masked is None else masked[order]
    return ArrangedDocuments(tokens, np.cumsum(lengths), masked, labels)


def concat_rows(pieces: Sequence[tuple[ArrangedDocuments, int, int]], row_tokens: int, pad_id: int) -> RowBatch:
    """Rows cut from consecutive pieces (block, first token, end), whose total is a multiple of `row_tokens`.

    Tokens of a piece beyond its block's are padding.
    """
    total = sum(end - begin for _, begin, end in pieces)
    tokens = np.empty(total, np.int32)
    labels = np.empty(total, np.int32) if _have_labels(pieces) else None
    targets = np.ones(total, bool)
    borders: list[np.ndarray] = []  # where a document or padding begins, and 0
    padding: list[np.ndarray] = []  # whether it is padding
    at = 0
    for block, begin, end in pieces:
        kept = max(min(end, len(block.tokens)), begin)
        tokens[at : at + kept - begin] = block.tokens[begin:kept]
        if labels is not None:
            labels[at : at + end - begin] = pad_id
            labels[at : at + kept - begin] = block.targets[begin:kept]
        if kept > begin:
            first = int(np.searchsorted(block.ends, begin, side="right"))
            last = int(np.searchsorted(block.ends, kept, side="left"))
            # Of the documents in the piece: the first may have begun before it, the others begin inside.
            begins = np.concatenate([[block.ends[first - 1] if first else 0], block.ends[first:last]])
            _mask(targets, block, first, begins, at - begin, (at, at + kept - begin))
            if begins[0] < begin:  # a document continues: no border, but that the first row begins here
                begins = begins[1:] if at else np.maximum(begins, begin)
            borders.append(begins + (at - begin))
            padding.append(np.zeros(len(begins), bool))
        if end > kept:
            tokens[at + kept - begin : at + end - begin] = pad_id
            targets[at + kept - begin : at + end - begin] = False
            borders.append(np.array([at + kept - begin]))
            padding.append(np.ones(1, bool))
        at += end - begin
    document_ids = _document_ids(np.concatenate(borders), np.concatenate(padding), total, row_tokens)
    shape = (-1, row_tokens)
    parts = (tokens.reshape(shape), document_ids.reshape(shape), targets.reshape(shape))
    return RowBatch(*parts, labels=None if labels is None else labels.reshape(shape))


def _have_labels(pieces: Sequence[tuple[ArrangedDocuments, int, int]]) -> bool:
    return any(block.labels is not None for block, _, _ in pieces)


def _mask(
    targets: np.ndarray, block: ArrangedDocuments, first: int, begins: np.ndarray, shift: int, limits: tuple[int, int]
) -> None:
    """Unmark the leading tokens of the documents from number `first` on, which begin at `begins` of the block."""
    low, high = limits
    positions = begins + shift
    if block.masked is None:
        targets[positions[positions >= low]] = False
        return
    for position, masked in zip(positions.tolist(), block.masked[first : first + len(positions)].tolist(), strict=True):
        targets[max(position, low) : max(min(position + masked, high), low)] = False


def _document_ids(borders: np.ndarray, padding: np.ndarray, total: int, row_tokens: int) -> np.ndarray:
    """int32 [total]: numbers of the segments that begin at `borders`, from 0 in every row, -1 for padding."""
    rows = np.arange(0, total, row_tokens)
    segments = np.sort(np.concatenate([borders, rows]))
    segments = segments[np.diff(segments, prepend=-1) > 0]
    is_padding = padding[np.searchsorted(borders, segments, side="right") - 1]
    before = np.cumsum(~is_padding) - ~is_padding  # documents that began before each segment
    ids = before - before[np.searchsorted(segments, rows)][segments // row_tokens]
    ids[is_padding] = -1
    return np.repeat(ids.astype(np.int32), np.diff(segments, append=total))


def tokens_cut_off(pieces: Sequence[tuple[ArrangedDocuments, int, int]], row_tokens: int) -> int:
    """How many tokens of these documents `pad_rows` gives to no row."""
    total = 0
    for block, begin, end in pieces:
        ends = block.ends[begin:end]
        if len(ends):  # a window with lost records holds fewer documents than it counts
            lengths = np.diff(ends, prepend=block.ends[begin - 1] if begin else 0)
            total += int(np.maximum(lengths - row_tokens, 0).sum())
    return total


def pad_rows(
    pieces: Sequence[tuple[ArrangedDocuments, int, int]], row_tokens: int, pad_id: int
) -> tuple[RowBatch, int]:
    """One row per document of the pieces (block, first document, end), and how many had to be cut to `row_tokens`.

    Documents of a piece beyond its block's are rows of padding.
    """
    rows = sum(end - begin for _, begin, end in pieces)
    tokens = np.full((rows, row_tokens), pad_id, np.int32)
    labels = tokens.copy() if _have_labels(pieces) else None
    lengths = np.zeros(rows, np.int64)
    masked = np.ones(rows, np.int64)
    row = 0
    for block, begin, end in pieces:
        kept = max(min(end, len(block.ends)), begin)
        ends = block.ends[begin:kept]
        begins = np.concatenate([block.ends[begin - 1 : begin] if begin else [0], ends[:-1]])[: len(ends)]
        lengths[row : row + len(ends)] = ends - begins
        if block.masked is not None:
            masked[row : row + len(ends)] = block.masked[begin:kept]
        cuts = np.minimum(ends, begins + row_tokens)
        for number, (first, cut) in enumerate(zip(begins.tolist(), cuts.tolist(), strict=True), row):
            tokens[number, : cut - first] = block.tokens[first:cut]
            if labels is not None:
                labels[number, : cut - first] = block.targets[first:cut]
        row += end - begin
    position = np.arange(row_tokens)
    inside = position < lengths[:, None]
    document_ids = inside.astype(np.int32) - 1
    truncated = int((lengths > row_tokens).sum())
    return RowBatch(tokens, document_ids, inside & (position >= masked[:, None]), labels), truncated
