"""Fetch: the module with which a state predicts several tokens jointly (Ahn et al. 2025, arXiv 2503.21801).

From a state h_t it reads d + 1 tokens one after the other: c_i = LayerNorm(e(x_{t+i}) + scale * h_t), i = 0 .. d, go
through one causal self-attention of their own, with a learned bias for each pair of places and nothing else: no
rotation, no MLP, no residual. Its outputs see nothing of the sequence but h_t and x_t .. x_{t+i}. Where the heads can
be divided over the tensor-parallel ranks each has a part of them; else every rank has all, and computes the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

LAYER_NORM_EPSILON = 1e-5
INITIAL_SCALE = 0.1


class Fetch(nn.Module):
    """(h [n, h], e(x) of d + 1 tokens [n, d + 1, h]) -> outputs [n, d + 1, h]."""

    def __init__(self, hidden_size: int, heads: int, steps: int, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        """`steps`: d."""
        super().__init__()
        assert hidden_size % heads == 0
        self.group = group if heads % group.size() == 0 else None
        parts = group.size() if self.group is not None else 1
        self.heads, self.head_size = heads // parts, hidden_size // heads
        width = self.heads * self.head_size
        self.layer_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON, dtype=dtype)
        self.scale = _constant((1,), INITIAL_SCALE, dtype)
        self.linear_qkv = nn.Parameter(torch.empty(3 * width, hidden_size, dtype=dtype))  # [q; k; v], heads in order
        self.linear_proj = nn.Parameter(torch.empty(hidden_size, width, dtype=dtype))
        self.relative_bias = _constant((self.heads, steps + 1, steps + 1), 0.0, dtype)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            reduce_from_tensor_model_parallel_region,
        )

        read = self.layer_norm(embedded + self.scale * hidden[:, None])
        if self.group is not None:
            read = copy_to_tensor_model_parallel_region(read, group=self.group)
        output = F.linear(attend(F.linear(read, self.linear_qkv), self.relative_bias, self.head_size), self.linear_proj)
        if self.group is not None:
            output = reduce_from_tensor_model_parallel_region(output, group=self.group)
        return output


def attend(qkv: torch.Tensor, relative_bias: torch.Tensor, head_size: int) -> torch.Tensor:
    """qkv [n, places, 3 * heads * head size], relative_bias [heads, places, places] -> [n, places, heads * head size].

    Place i attends to places 0 .. i.
    """
    rows, places, _ = qkv.shape
    q, k, v = qkv.view(rows, places, 3, -1, head_size).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) * head_size**-0.5 + relative_bias
    later = torch.ones(places, places, dtype=torch.bool, device=qkv.device).triu(1)
    attention = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    return (attention @ v).transpose(1, 2).reshape(rows, places, -1)


def _constant(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> nn.Parameter:
    """A parameter that begins as one number (`model.initialize`)."""
    parameter = nn.Parameter(torch.full(shape, value, dtype=dtype))
    parameter.initial_value = value  # type: ignore[attr-defined]
    return parameter
