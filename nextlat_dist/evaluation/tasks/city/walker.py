"""A model as a walker through the city: the tokens that it expects next, and where it drives.

Invariant: the scores see a model through `Walker` alone, so that a table of answers, the walk's own distribution and an
export are scored by the same code, and the first two have scores that are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from nextlat_dist.evaluation.tasks.answers import ROWS
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import PAD_ID


class Walker(Protocol):
    """Reads histories of token ids, BOS first."""

    def log_probabilities(self, histories: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """float [tokens, vocab] per history: those of the next token after each of its tokens."""

    def continuations(
        self, histories: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """Token ids after each history, up to and with EOS; temperature 0 is greedy, and then the seed is unused."""


class ExportWalker:
    """An export. `context` tokens at least can be read and written together."""

    def __init__(self, model: ExportModel, context: int) -> None:
        self._model = model
        self._decoder = model.decoder(context)

    def log_probabilities(self, histories: Sequence[Sequence[int]]) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for start in range(0, len(histories), ROWS):
            batch = histories[start : start + ROWS]
            tokens = torch.full((len(batch), max(map(len, batch))), PAD_ID)
            for row, history in enumerate(batch):
                tokens[row, : len(history)] = torch.tensor(history)
            states = self._model.states(tokens)
            for row, history in enumerate(batch):
                logits = self._model.logits(states[row, : len(history)])
                found.append(logits.float().log_softmax(dim=-1).cpu().numpy())
        return found

    def continuations(
        self, histories: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        generations = self._decoder.generate(
            [list(history) for history in histories],
            max_new_tokens=max_new_tokens,
            draft_length=0,
            temperature=temperature,
            seed=seed,
            batch_size=ROWS,
        )
        return [generation.token_ids for generation in generations]
