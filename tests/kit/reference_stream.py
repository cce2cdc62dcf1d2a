"""The stream of rows as its rules say it, in plain slow Python that shares no code with the package.

The stream is epoch 0, epoch 1, … without end; each holds every record once.
Shuffled, an epoch permutes the records of the whole dataset, every `window` of them in that order make a window, and
the documents of a window are permuted; otherwise everything stays as it was stored.
A permutation of n things with a key is the stable order of n raw numbers of numpy's PCG64 with that key: (seed,
epoch, 0) for records, (seed, epoch, 1, first record of the window) for its documents.
`concat`: all documents one after another are cut into rows. `pad`: one document is one row, cut or padded.
A document's number counts within its row, padding is -1. A token is a target when its index in its document is at
least max(prompt length, 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np


@dataclass(frozen=True)
class Document:
    tokens: tuple[int, ...]
    prompt: int


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    document_ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class Rules:
    seed: int
    shuffle: bool
    window: int
    packing: str
    row_tokens: int
    pad_id: int


def records_of(documents: Sequence[Document], record_tokens: int) -> list[list[Document]]:
    """Whole consecutive documents; a record is full as soon as it has `record_tokens` tokens."""
    records: list[list[Document]] = []
    open_tokens = record_tokens
    for document in documents:
        if open_tokens >= record_tokens:
            records.append([])
            open_tokens = 0
        records[-1].append(document)
        open_tokens += len(document.tokens)
    return records


def epoch(records: Sequence[Sequence[Document]], number: int, rules: Rules) -> list[Document]:
    """All documents of one epoch, in order."""
    order = _permutation(len(records), (rules.seed, number, 0)) if rules.shuffle else list(range(len(records)))
    result: list[Document] = []
    while order:
        window, order = order[: rules.window], order[rules.window :]
        documents = [document for record in window for document in records[record]]
        if rules.shuffle:
            places = _permutation(len(documents), (rules.seed, number, 1, window[0]))
            documents = [documents[place] for place in places]
        result += documents
    return result


def rows(records: Sequence[Sequence[Document]], rules: Rules, count: int) -> list[Row]:
    """The first `count` rows of the stream."""
    return list(islice((_concat if rules.packing == "concat" else _pad)(records, rules), count))


def _concat(records: Sequence[Sequence[Document]], rules: Rules) -> Iterator[Row]:
    row = Row([], [], [])
    for document in _stream(records, rules):
        number = row.document_ids[-1] + 1 if row.tokens else 0
        for index, token in enumerate(document.tokens):
            row.tokens.append(token)
            row.document_ids.append(number)
            row.loss_mask.append(index >= max(document.prompt, 1))
            if len(row.tokens) == rules.row_tokens:
                yield row
                row, number = Row([], [], []), 0


def _pad(records: Sequence[Sequence[Document]], rules: Rules) -> Iterator[Row]:
    for document in _stream(records, rules):
        row = Row([], [], [])
        for index in range(rules.row_tokens):
            inside = index < len(document.tokens)
            row.tokens.append(document.tokens[index] if inside else rules.pad_id)
            row.document_ids.append(0 if inside else -1)
            row.loss_mask.append(inside and index >= max(document.prompt, 1))
        yield row


def _stream(records: Sequence[Sequence[Document]], rules: Rules) -> Iterator[Document]:
    number = 0
    while True:
        yield from epoch(records, number, rules)
        number += 1


def _permutation(length: int, key: tuple[int, ...]) -> list[int]:
    raw = [int(value) for value in np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)]
    return sorted(range(length), key=raw.__getitem__)
