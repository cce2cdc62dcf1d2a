"""The text head of the Belief State Transformer (Hu et al. 2025, arXiv 2410.23506).

From a state of what came before and one of what comes after, what the output head reads of the next and of the previous
token: x = concat(f, b), RMSNorm(x + Linear(SwiGLU(x))), cut in two halves. Its matrices are split over the
tensor-parallel ranks as those of a decoder layer's MLP.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class TextHead(nn.Module):
    """(f [n, h], b [n, h]) -> states of the next and of the previous token [n, 2, h]."""

    def __init__(
        self, hidden_size: int, inner_size: int, norm_epsilon: float, dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.group, width = group, 2 * hidden_size
        local = inner_size // group.size()
        self.linear_fc1 = nn.Parameter(torch.empty(2 * local, width, dtype=dtype))  # [gate; up]
        self.linear_fc2 = nn.Parameter(torch.empty(width, local, dtype=dtype))
        self.layer_norm = nn.RMSNorm(width, eps=norm_epsilon, dtype=dtype)

    def forward(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        x = read = torch.cat([before, after], dim=-1)
        if self.group.size() > 1:
            read = copy_to_tensor_model_parallel_region(read, group=self.group)
        gate, up = F.linear(read, self.linear_fc1).chunk(2, dim=-1)
        update = F.linear(F.silu(gate) * up, self.linear_fc2)
        if self.group.size() > 1:
            update = reduce_from_tensor_model_parallel_region(update, group=self.group)
        states: torch.Tensor = self.layer_norm(x + update)
        return states.unflatten(-1, (2, -1))
