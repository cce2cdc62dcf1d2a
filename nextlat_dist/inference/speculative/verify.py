"""Which drafted tokens stay, and which token follows them: speculative sampling (Leviathan et al. 2023).

The invariant: whatever the drafts and their distribution q, the emitted tokens follow the base distribution p exactly.
A drafted x is kept with probability min(1, p(x)/q(x)); the first one that is not is replaced by a draw from
max(p - q, 0), normalised; if all are kept, one more token comes from p at the last position. How many tokens a row
drafted may depend on anything that was known before its next token was drawn, and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nextlat_dist.inference.sampling import draw


@dataclass
class DraftStep:
    """The drafts at one position, of the rows that drafted so far.

    `q` is what the tokens were drawn from, [len(rows), draft vocab], and `q_token` its value at them; both None when
    greedy.
    """

    rows: list[int]
    tokens: list[int]
    q: torch.Tensor | None = None
    q_token: list[float] | None = None


@dataclass
class Drafts:
    """What the rows of a batch drafted in one cycle, position by position.

    `vocabulary` [draft vocab] holds the base ids of q's columns; None: they are the base's own.
    """

    rows: int
    vocabulary: torch.Tensor | None = None
    steps: list[DraftStep] = field(default_factory=list)

    def tokens(self) -> list[list[int]]:
        """Drafted ids of every row, in order."""
        drafted: list[list[int]] = [[] for _ in range(self.rows)]
        for step in self.steps:
            for row, token in zip(step.rows, step.tokens, strict=True):
                drafted[row].append(token)
        return drafted


def verify_greedy(choices: Sequence[int], drafts: Drafts) -> tuple[list[int], list[int]]:
    """As `verify_sampled` for temperature 0: `choices` are the tokens that the base model takes, laid out as p is."""
    accepted, following, start = [], [], 0
    for drafted in drafts.tokens():
        kept = next((i for i, token in enumerate(drafted) if choices[start + i] != token), len(drafted))
        accepted.append(kept)
        following.append(choices[start + kept])
        start += len(drafted) + 1
    return accepted, following


def verify_sampled(p: torch.Tensor, drafts: Drafts, uniforms: Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    """Per row the number of drafted tokens kept, and the token after them.

    Args:
        p: [drafted tokens + rows, vocab], the base distribution at each drafted position of row 0 and at the one after
            the last, then those of row 1, ….
        drafts: what was drafted, and from what.
        uniforms: per row, numbers in [0, 1): one per drafted token, the last for the token after them.
    """
    drafted = drafts.tokens()
    starts = [0]
    for tokens in drafted:
        starts.append(starts[-1] + len(tokens) + 1)
    assert p.shape[0] == starts.pop()
    assert [len(numbers) for numbers in uniforms] == [len(tokens) + 1 for tokens in drafted]
    accepted = _accepted(p, drafts, starts, uniforms)
    following = p[torch.tensor([start + kept for start, kept in zip(starts, accepted, strict=True)], device=p.device)]
    for position, step in enumerate(drafts.steps):
        rejected = [(i, row) for i, row in enumerate(step.rows) if accepted[row] == position]
        if rejected:
            assert step.q is not None
            index, rows = torch.tensor(rejected, device=p.device).t().unbind()
            following[rows] = residual(following[rows], step.q[index], drafts.vocabulary)
    last = torch.tensor([numbers[-1] for numbers in uniforms], dtype=torch.float64, device=p.device)
    return accepted, draw(following, last).tolist()


def _accepted(p: torch.Tensor, drafts: Drafts, starts: Sequence[int], uniforms: Sequence[Sequence[float]]) -> list[int]:
    accepted = [0] * drafts.rows
    for position, step in enumerate(drafts.steps):
        assert step.q_token is not None
        reached = [i for i, row in enumerate(step.rows) if accepted[row] == position]
        if not reached:
            break
        places = torch.tensor([(starts[step.rows[i]] + position, step.tokens[i]) for i in reached], device=p.device).t()
        for i, p_token in zip(reached, p[places[0], places[1]].tolist(), strict=True):
            row = step.rows[i]
            if uniforms[row][position] * step.q_token[i] < p_token:
                accepted[row] += 1
    return accepted


def residual(p: torch.Tensor, q: torch.Tensor, vocabulary: torch.Tensor | None = None) -> torch.Tensor:
    """What p has beyond q, up to a factor, [rows, vocab]; p itself where rounding leaves nothing.

    Args:
        p: [rows, vocab].
        q: [rows, draft vocab], 0 at every id that `vocabulary` does not name.
    """
    excess = p.clone()
    if vocabulary is None:
        excess -= q
    else:
        excess[:, vocabulary] -= q
    excess.clamp_(min=0)
    return torch.where(excess.sum(dim=-1, keepdim=True) > 0, excess, p)
