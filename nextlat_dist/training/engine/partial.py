"""Gradients of parameters that every tensor rank holds whole but applies to a part (`Sharding.partial`): summed.

A norm over the heads of attention is such a parameter: a rank has some of the heads, so its gradient is one summand.
Without the sum the copies drift apart, and no rank has the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.model.sharding import Rules, sharding_of


def sum_partial_gradients(module: nn.Module, rules: Rules, tensor_group: dist.ProcessGroup) -> None:
    """Sum every partial gradient over the tensor ranks as a backward pass hands it over: for each micro-batch.

    There it is before everything that an engine does with gradients (accumulation, partitions, norm, clipping), so it
    works alike for all ZeRO stages and pipelines. The order of the sums is the same on all tensor ranks, because they
    run the same backward pass.
    """
    if tensor_group.size() == 1:
        return
    for name, parameter in canonical_parameters(module):
        if sharding_of(name, rules).partial:
            parameter.register_hook(_summed_over(tensor_group))


def _summed_over(group: dist.ProcessGroup) -> Callable[[torch.Tensor], torch.Tensor]:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.float() if gradient.dtype == torch.bfloat16 else gradient.clone()
        dist.all_reduce(total, group=group)
        return total.to(gradient.dtype)

    return hook
