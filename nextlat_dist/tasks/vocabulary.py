"""What every task speaks: the special ids, a document, and what a task is.

Invariant: the special ids are those of a tokenizer of `nextlat-data tokenizer`, and the words of a task follow them in
the order of `Task.symbols`, so the id of a word is the same in training, generation and scoring. Needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from nextlat_dist.errors import UserError

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
        labels: int64 [n] or None; what is predicted in a token's place where that is not the token itself: the state
            that has read token t predicts labels[t + 1].
        beliefs: float32 [n, states] or None; the exact belief after reading tokens 0 .. t.
    """

    tokens: np.ndarray
    prompt_tokens: int
    content: bytes
    labels: np.ndarray | None = None
    beliefs: np.ndarray | None = None


class Task(Protocol):
    """A world that documents are drawn from. Implementations are frozen dataclasses whose fields are `parameters`."""

    @property
    def name(self) -> str: ...

    @property
    def symbols(self) -> tuple[str, ...]:
        """Words of the vocabulary beyond the special four, without spaces: id = FIRST_SYMBOL_ID + index."""

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON; `make_task(name, parameters)` gives the same world again."""

    def sample(self, rng: np.random.Generator, split: Split) -> Document:
        """A document that depends on the world and the state of `rng` alone."""


def vocab_size(task: Task) -> int:
    return FIRST_SYMBOL_ID + len(task.symbols)


def words_of(task: Task, tokens: Iterable[int] | np.ndarray) -> list[str]:
    """The words of token ids; special tokens as `SPECIAL_WORDS`."""
    words = (*SPECIAL_WORDS, *task.symbols)
    return [words[token] for token in tokens]


def require_at_least(task: str, **limits: tuple[int, int]) -> None:
    """Raises UserError for the first option whose (value, least) is too small."""
    for option, (value, least) in limits.items():
        if value < least:
            raise UserError(f"{task} with --{option.replace('_', '-')} {value} is no task; it must be at least {least}")


def id_array(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n]: the parts behind each other."""
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
