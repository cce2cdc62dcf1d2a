"""The effective rank (Roy & Vetterli 2007), as in arXiv 2511.05963: how many directions hidden states use.

    effective_rank(states: Tensor) -> float
    effective_rank_of_logits(states: Tensor, head_weight: Tensor) -> float

exp(entropy) of the singular values divided by their sum; those below 1e-12 are dropped. k equal singular values give
k, whatever their scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat_dist.errors import UserError

SMALLEST = 1e-12  # singular values below it are dropped


def effective_rank(states: Tensor) -> float:
    """Effective rank of `states` [n, hidden], not centred; between 1 and min(n, hidden), and 0 for a matrix of zeros.

    Computed in float64 whatever the dtype, on the device of the states.

    Raises:
        UserError: an element is not finite.
    """
    assert states.dim() == 2, f"[n, hidden] is wanted, not {list(states.shape)}"
    if not torch.isfinite(states).all():
        raise UserError(
            f"hidden states of shape {list(states.shape)} hold NaN or infinity, so they have no effective rank; "
            "look at the run that was exported"
        )
    values = torch.linalg.svdvals(states.double())
    values = values[values >= SMALLEST]
    if len(values) == 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def effective_rank_of_logits(states: Tensor, head_weight: Tensor) -> float:
    """That of the logits, states [n, hidden] times head_weight [vocab, hidden] transposed, which are never made: with
    W = Q R, they have the singular values of states times R transposed.

    Raises:
        UserError: as `effective_rank`.
    """
    _, r = torch.linalg.qr(head_weight.double())
    return effective_rank(states.double() @ r.t())
