"""From logits to the distribution that is sampled: temperature, then top-k, then top-p, as in transformers.

The *warped* distribution is what speculative sampling preserves, so drafts and verification warp by the same function.
Tokens are drawn by inverting the cumulative distribution at a given uniform number: one draw is one number, which makes
runs repeatable and lets a test integrate over every outcome exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nextlat_dist.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy (top_k and top_p then change nothing); top_k 0 and top_p 1.0 are off.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(
                f"temperature is {self.temperature}, but must be a number ≥ 0 (0 is greedy); change temperature"
            )
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, but must be ≥ 0 (0 keeps every token); change top_k")
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}, but must be above 0 and at most 1 (1 keeps every token); change top_p"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [..., vocab] → probabilities [..., vocab], at least fp32; needs temperature > 0.

        Tokens that tie with the k-th largest logit all stay; top-p keeps the smallest set whose mass reaches top_p.
        """
        assert not self.greedy
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
            mass_before = ordered.cumsum(dim=-1) - ordered
            kept = ordered.masked_fill(mass_before >= self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
            probabilities /= probabilities.sum(dim=-1, keepdim=True)
        return probabilities


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token per row: the one at `uniforms[row]` of the cumulative weights; never one of weight 0.

    Args:
        weights: [rows, vocab], not negative and not all 0 in a row; they need not sum to 1.
        uniforms: [rows], float64 in [0, 1).
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # The product may round up to the total.
    target = torch.minimum(total * uniforms, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
