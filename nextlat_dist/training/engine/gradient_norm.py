"""The global gradient norm: every distinct gradient counts once, whatever layout the ranks have.

Each rank has a share, the squares of what it counts; the norm is the root of all shares together. The share travels
with what ranks exchange at a step anyway, so no rank waits for the norm alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def share_of(gradients: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The sum of their squares, a float64 scalar on the rank's device; each square is added in float64."""
    norms = [torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64) for gradient in gradients]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).square().sum()


def norm_of(shares: float) -> float:
    """The norm from all shares together; infinite where that is not a number."""
    return math.sqrt(shares) if math.isfinite(shares) else math.inf


def is_tied_copy(parameter: nn.Parameter) -> bool:
    """A later pipeline stage's copy of a parameter that an earlier stage holds too."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def counts_here(parameter: nn.Parameter, tensor_rank: int) -> bool:
    """Whether it counts on this rank: replicated ones do on one tensor rank, tied ones on their first stage."""
    if is_tied_copy(parameter):
        return False
    return tensor_rank == 0 or bool(getattr(parameter, "tensor_model_parallel", False))


def of_parameters(parameters: Iterable[nn.Parameter], tensor_rank: int) -> Iterator[torch.Tensor]:
    """ZeRO 0: every data-parallel rank has all of them, so the share is to be divided by their number."""
    return (p.grad for p in parameters if p.grad is not None and counts_here(p, tensor_rank))


def of_partition(gradients: list[Any], parameters: list[nn.Parameter], tensor_rank: int) -> Iterator[torch.Tensor]:
    """Of one group: ZeRO 1 to 3 gives a data-parallel rank its partition, the bf16 optimizer all."""
    # ZeRO 1 and 2 leave out padding of a partition, which is no parameter's.
    real = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
    for gradient, parameter in zip(real, parameters, strict=False):
        if gradient is not None and counts_here(parameter, tensor_rank):
            yield gradient


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float) -> None:
    """Scale gradients of global `norm` down to `max_norm`; 0: leave them."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and 0 < max_norm < norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
