"""Rotary position embedding (RoPE, arXiv 2104.09864), the two halves of a head as the pairs, as in Llama.

The table is made once; a rotation makes one tensor in either direction and keeps none: its gradient is the rotation
back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nextlat_dist.parallel.compiled import piece


def rotary_angles(sequence_length: int, head_size: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """[s, 1, 1, head size] angles, each frequency twice (rotate-half); fp32, or fp64 for an fp64 model."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.int64).to(wide) / head_size)
    angles = torch.outer(torch.arange(sequence_length).to(wide), inverse)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class Rotation(NamedTuple):
    """Of every position [s, 1, 1, head size / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, angles: torch.Tensor, dtype: torch.dtype) -> Rotation:
        """Angles [s, 1, 1, head size] of `rotary_angles`."""
        half = angles[..., : angles.shape[-1] // 2]
        return cls(half.cos().to(dtype), half.sin().to(dtype))

    def first(self, positions: int) -> Rotation:
        return Rotation(self.cos[:positions], self.sin[:positions])

    def to(self, device: torch.device) -> Rotation:
        return Rotation(self.cos.to(device), self.sin.to(device))

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """[s, b, heads, head size], each position by its angles."""
        rotated: torch.Tensor = _Rotate.apply(heads, self.cos, self.sin)
        return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, sin, -1), None, None


@piece
def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    one, other = heads.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # it writes no half of a tensor, and needs no place for what lies between
        turned = direction * sin
        return torch.cat([one * cos - other * turned, other * cos + one * turned], dim=-1)
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = out.chunk(2, dim=-1)
    torch.mul(one, cos, out=first)
    first.addcmul_(other, sin, value=-direction)
    torch.mul(other, cos, out=second)
    second.addcmul_(one, sin, value=direction)
    return out
