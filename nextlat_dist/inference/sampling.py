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
from nextlat_dist.inference.arguments import real, whole

PREFIX = 1024  # probabilities that top-p looks at before it sorts all of them
GREEDY_BELOW = 1e-20  # temperatures under which fp32 could not divide; no two logits are near enough to notice


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy (top_k and top_p then change nothing); top_k 0 and top_p 1.0 are off.

    Raises:
        UserError: a value out of its range, or no number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        temperature, top_p = real("temperature", self.temperature), real("top_p", self.top_p)
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is {temperature}, but must be a number ≥ 0 (0 is greedy); change temperature")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}, but must be above 0 and at most 1 (1 keeps every token); change top_p")
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_k", whole("top_k", self.top_k, 0, " (0 keeps every token)"))
        object.__setattr__(self, "top_p", top_p)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [..., vocab] → probabilities [..., vocab], at least fp32; needs temperature > 0.

        Tokens that tie with the k-th largest logit all stay; top-p keeps the smallest set whose mass reaches top_p, of
        tokens that tie at its edge those of the smallest ids.
        """
        assert not self.greedy
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
            probabilities /= probabilities.sum(dim=-1, keepdim=True)
        return probabilities


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """probabilities [..., vocab] with those outside of the smallest set whose mass reaches `top_p` set to 0.

    On a CPU sorting a vocabulary takes a hundred times as long as its softmax, so the set is sought in the largest
    PREFIX probabilities. Rows whose set is larger, or that have ties at its edge, are sorted: the result is the same to
    the bit. (On a GPU everything is sorted: a captured graph cannot look at its numbers.)
    """
    size = probabilities.shape[-1]
    if probabilities.device.type != "cpu" or size <= PREFIX:
        return _sorted_nucleus(probabilities, top_p)
    rows = probabilities.reshape(-1, size)
    ordered = rows.topk(PREFIX, dim=-1).values
    count = (ordered.cumsum(dim=-1) - ordered < top_p).sum(dim=-1, keepdim=True)
    least = ordered.gather(-1, count - 1)
    kept = rows.masked_fill(rows < least, 0.0)
    unclear = (count == PREFIX) | ((rows >= least).sum(dim=-1, keepdim=True) != count)
    if unclear.any():
        index = unclear[:, 0].nonzero()[:, 0]
        kept[index] = _sorted_nucleus(rows[index], top_p)
    return kept.reshape(probabilities.shape)


def _sorted_nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(mass_before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


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
