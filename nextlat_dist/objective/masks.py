"""Masks of the loss terms: which positions enter each.

Position t counts for next_token if x_{t+1} is a loss token of the same document; the pair (t, i) counts for hidden if
t .. t+i lie in one document, and for kl if moreover position t+i counts for next_token. Then x_{t+1+i} is a loss token
and t .. t+1+i lie in one document: the pair counts for mtp. Document numbers grow along a row, so comparing the two
ends of a span is enough.

As the authors' release has it (`Batch.released`), position t counts for next_token if x_{t+1} is a loss token at all,
and of a span the last step alone must stay in a document: a rollout of two steps or more may have passed over an end.
"""

from __future__ import annotations

import torch

from nextlat_dist.model.rows import Batch


def next_token_mask(batch: Batch) -> torch.Tensor:
    """bool [s, b]."""
    document, loss_mask = batch.document_ids, batch.loss_mask
    real = (document[:, :-1] >= 0) & (document[:, 1:] >= 0)
    counts = loss_mask[:, 1:] & real
    return (counts if batch.released else counts & (document[:, 1:] == document[:, :-1])).t()


def state_mask(batch: Batch, step: int) -> torch.Tensor:
    """Where t .. t + step (>= 1) lie in one document: bool [s - step, b], indexed by t."""
    document = batch.input_documents
    before = document[:, step - 1 : -1] if batch.released else document[:, :-step]
    counts = (before == document[:, step:]) & (document[:, step:] >= 0)
    return counts.t()


def token_mask(batch: Batch, step: int) -> torch.Tensor:
    """Where moreover x_{t+1+step} is a loss token of that document: bool [s - step, b], indexed by t."""
    return state_mask(batch, step) & next_token_mask(batch)[step:]


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over `mask`, in at least fp32; a masked value never takes part, not even as 0 * inf."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()
