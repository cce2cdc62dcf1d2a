"""Which drafted tokens stay, and which token follows them: speculative sampling (Leviathan et al. 2023).

The invariant: whatever the drafts and their distribution q, the emitted tokens follow the base distribution p exactly.
A drafted x is kept with probability min(1, p(x)/q(x)); the first one that is not is replaced by a draw from
max(p - q, 0), normalised; if all are kept, one more token comes from p at the last position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nextlat_dist.inference.sampling import draw


def verify_sampled(
    p: torch.Tensor, q: torch.Tensor, drafted: Sequence[int], uniforms: Sequence[float]
) -> tuple[int, int]:
    """The number of drafted tokens kept and the token after them.

    Args:
        p: [k + 1, vocab], the base distribution at each drafted position and at the one after the last.
        q: [k, vocab], the distribution that each drafted token was drawn from.
        drafted: k token ids.
        uniforms: k + 1 numbers in [0, 1): one per drafted token, the last for the token after them.
    """
    length = len(drafted)
    assert (p.shape[0], q.shape[0], len(uniforms)) == (length + 1, length, length + 1)
    for position, token in enumerate(drafted):
        if uniforms[position] * float(q[position, token]) >= float(p[position, token]):
            return position, draw(residual(p[position], q[position]), uniforms[-1])
    return length, draw(p[length], uniforms[-1])


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What p has beyond q, normalised, [vocab]; p itself where rounding leaves nothing."""
    excess = (p - q).clamp_(min=0)
    total = excess.sum()
    return excess / total if total > 0 else p


def verify_greedy(choices: Sequence[int], drafted: Sequence[int]) -> tuple[int, int]:
    """As `verify_sampled` for temperature 0: `choices` are the k + 1 tokens that the base model would take."""
    assert len(choices) == len(drafted) + 1
    for position, token in enumerate(drafted):
        if choices[position] != token:
            return position, choices[position]
    return len(drafted), choices[-1]
