"""The gated MLP of Megatron-Core with one activation, silu(gate) * up, whose gradient is written where it belongs.

Autograd alone keeps the output of `linear_fc1` [s, b, 2 f], silu of its first half and the product that `linear_fc2`
reads. `GatedMLP` keeps the first and the last; `RecomputedMLP` the first alone. Both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nextlat_dist.parallel.compiled import piece


class GatedMLP(nn.Module):
    """The matrices of a Megatron-Core MLP that is gated by silu and has no biases."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = mlp.linear_fc1, mlp.linear_fc2

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias)."""
        output: torch.Tensor = self.linear_fc2(_Gated.apply(self.linear_fc1(hidden)[0]))[0]
        return output, None


class RecomputedMLP(GatedMLP):
    """The same, with selective recomputation.

    The activation moves into the product of `linear_fc2`, whose module stays the one that is called: ZeRO-3 gathers its
    weight then.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__(mlp)
        self.linear_fc2._forward_impl = _gated_product

    def forward(self, hidden: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        output: torch.Tensor = self.linear_fc2(self.linear_fc1(hidden)[0])[0]
        return output, None


class _Gated(torch.autograd.Function):
    """x [..., 2 f] -> silu(x[..., :f]) * x[..., f:]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _product(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return _gradient(gradient, x)


class _GatedProduct(torch.autograd.Function):
    """(x [..., 2 f], W [h, f]) -> (silu(x[..., :f]) * x[..., f:]) W^T [..., h]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.matmul(_product(x), weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        of_weight = gradient.flatten(0, -2).t().matmul(_product(x).flatten(0, -2))
        return _gradient(gradient.matmul(weight), x), of_weight


@piece
def _product(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@piece
def _gradient(of_product: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of x, from the gradient of the product."""
    gate, up = x.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # it writes no half of a tensor
        of_gate = torch.ops.aten.silu_backward(of_product * up, gate)
        return torch.cat([of_gate, of_product * F.silu(gate)], dim=-1)
    found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    of_gate, of_up = found.chunk(2, dim=-1)
    torch.ops.aten.silu_backward.grad_input(of_product * up, gate, grad_input=of_gate)
    torch.mul(of_product, F.silu(gate), out=of_up)
    return found


def _gated_product(input: torch.Tensor, weight: torch.Tensor, **_: Any) -> torch.Tensor:
    """As Megatron-Core calls the product of a `RowParallelLinear`."""
    product: torch.Tensor = _GatedProduct.apply(input, weight)
    return product
