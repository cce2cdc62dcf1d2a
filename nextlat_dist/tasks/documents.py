"""A document of a task, and the special ids that all of them have.

Invariant: the special ids are those of a tokenizer of `nextlat-data tokenizer`, and the words of a task follow them in
the order of `Task.symbols`, so the id of a word is the same in training, generation and scoring. Needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
FIRST_SYMBOL_ID = 4
SPECIAL_WORDS = ("<unk>", "<s>", "</s>", "<pad>")

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Document:
    """One problem with its answer.

    Attributes:
        tokens: int64 [n] ids, BOS first.
        prompt_tokens: leading tokens that are never predicted, BOS included.
        content: what train and test must not share; equal problems give equal bytes.
        labels: int64 [n] or None; what is predicted instead of a token, where that is not the token itself: the state
            that has read token t predicts labels[t + 1].
        beliefs: float32 [n, states] or None; the exact belief after reading tokens 0 .. t.
    """

    tokens: np.ndarray
    prompt_tokens: int
    content: bytes
    labels: np.ndarray | None = None
    beliefs: np.ndarray | None = None


def id_array(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n]: the parts one after the other."""
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
