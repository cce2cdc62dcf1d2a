"""What counts: which positions enter each loss term, and how many there are.

The vector of terms is [next_token, hidden step 1..d, kl step 1..d]. Position t counts for next_token if x_{t+1} is a
loss token of the same document; the pair (t, i) counts for hidden if t .. t+i lie in one document, and for kl if
moreover position t+i counts for next_token. Document numbers grow along a row, so comparing the two ends of a span is
enough.
"""

from __future__ import annotations

import torch

from nextlat_dist.model.embedding import DOCUMENT, LOSS_MASK


def next_token_mask(rows: torch.Tensor) -> torch.Tensor:
    """rows [b, s + 1, 3] -> bool [s, b]."""
    document, loss_mask = rows[..., DOCUMENT], rows[..., LOSS_MASK].bool()
    return (loss_mask[:, 1:] & (document[:, 1:] == document[:, :-1]) & (document[:, :-1] >= 0)).t()


def rollout_masks(rows: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of rollout step `step` >= 1: (hidden, kl), both bool [s - step, b], indexed by the position t it starts
    from.
    """
    document = rows[:, :-1, DOCUMENT]
    hidden = ((document[:, :-step] == document[:, step:]) & (document[:, step:] >= 0)).t()
    return hidden, hidden & next_token_mask(rows)[step:]


def term_counts(rows: torch.Tensor, rollout_steps: int) -> torch.Tensor:
    """How many positions enter each term: float64 [1 + 2 * rollout_steps]."""
    pairs = [rollout_masks(rows, step) for step in range(1, rollout_steps + 1)]
    masks = [next_token_mask(rows), *(hidden for hidden, _ in pairs), *(kl for _, kl in pairs)]
    return torch.stack([mask.sum() for mask in masks]).double()


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over `mask`, in at least fp32; a masked value never takes part, not even as 0 * inf."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()
