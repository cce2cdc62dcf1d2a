"""The interface of a task: a world that documents are drawn from. Needs numpy alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.documents import FIRST_SYMBOL_ID, SPECIAL_WORDS, Document, Split


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
