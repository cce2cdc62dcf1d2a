"""Drafts: what proposes tokens for the base model to verify. Any proposals are lossless, good ones are fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from nextlat_dist.inference.sampling import Sampling, draw


@dataclass(frozen=True)
class Chooser:
    """How a draft is chosen from a drafter's logits; `vocabulary` [draft vocab] holds the base ids of their columns."""

    sampling: Sampling
    vocabulary: torch.Tensor | None

    def scores(self, logits: torch.Tensor, normalised: bool) -> torch.Tensor:
        """What drafts are chosen by: the distribution q that they are drawn from; when greedy the logits, or the
        log-softmax of them if they are to tell the drafter's confidence too (`normalised`).
        """
        if not self.sampling.greedy:
            return self.sampling.probabilities(logits)
        return logits.log_softmax(dim=-1) if normalised else logits

    def confidences(self, scores: torch.Tensor) -> torch.Tensor:
        """[rows], the largest probability of each row (when greedy, that of temperature 1), from normalised scores."""
        best = scores.amax(dim=-1)
        return best.exp() if self.sampling.greedy else best

    def choose(self, scores: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafted ids [rows] and their scores: the best ones when greedy, else drawn at `uniforms` [rows]."""
        if self.sampling.greedy:
            values, columns = scores.max(dim=-1)
        else:
            columns = draw(scores, uniforms)
            values = scores.gather(1, columns[:, None])[:, 0]
        return columns if self.vocabulary is None else self.vocabulary[columns], values


class Drawn(NamedTuple):
    """Drafts of every row at a stretch: [rows, steps] each, scores [rows, steps, draft vocab].

    Without a use for them, `confidences` and (when greedy) `scores` have no steps.
    """

    tokens: torch.Tensor
    values: torch.Tensor  # the scores of the tokens
    confidences: torch.Tensor
    scores: torch.Tensor


class DraftMemory(Protocol):
    """What drafting remembers of the rows of a batch, row by row as in the base model's cache."""

    def observe(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        """Take note of verified states, after each chunk of the prefill and after each cycle.

        Args:
            states: [sum(counts), hidden], the base model's h at `counts[r]` new positions of row r, all of row 0 first.
            settled: of each row's new positions, how many (the first ones) stay; the rest was rejected.
        """

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        """A new cycle of the given rows of the batch, ascending (None: all of them), from the verified states
        h [rows, hidden] that their last tokens were picked from.
        """

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Logits of the next draft, [rows that continue, draft vocab].

        Args:
            tokens: [rows that continue], the token before it: the last emitted one, then the last drafted one.
            kept: which of the rows of the previous call in this cycle continue, ascending; None: all of them.
        """

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        """A cycle of all rows that drafts as many tokens as `uniforms` [rows, steps] has columns; see `begin`,
        `logits`.
        """

    def move(self, source: int, target: int) -> None:
        """Row `source` replaces row `target`; the rows from `source` on are not used again."""


class Drafter(Protocol):
    """Proposes tokens for the rows of a batch."""

    longest: int | None  # most tokens it can draft in a cycle; None: any number
    vocabulary: torch.Tensor | None  # [draft vocab], base ids of the columns of its logits; None: the base's own

    def start(self, rows: int, capacity: int) -> DraftMemory:
        """The memory of a new batch of `rows` rows of up to `capacity` tokens."""


def unroll(
    memory: DraftMemory,
    chooser: Chooser,
    h: torch.Tensor,
    tokens: torch.Tensor,
    uniforms: torch.Tensor,
    confidences: bool,
) -> Drawn:
    """`DraftMemory.roll`, step by step; the host is not waited for."""
    memory.begin(h)
    steps: list[tuple[torch.Tensor, ...]] = []
    for step in range(uniforms.shape[1]):
        scores = chooser.scores(memory.logits(tokens, None), confidences)
        tokens, values = chooser.choose(scores, uniforms[:, step])
        steps.append((tokens, values, chooser.confidences(scores) if confidences else values, scores))
    ids, values, largest = (torch.stack(part, dim=1) for part in list(zip(*steps, strict=True))[:3])
    q = scores[:, None][:, :0] if chooser.sampling.greedy else torch.stack([own[3] for own in steps], dim=1)
    return Drawn(ids, values, largest if confidences else largest[:, :0], q)
