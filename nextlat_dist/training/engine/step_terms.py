"""The term sums of a step, collected where the loss is computed."""

from __future__ import annotations

import torch

from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.terms import weighted_sum


class StepTerms:
    """`loss_fn(term sums, weights) -> loss`, which adds up the sums it sees until they are taken.

    A pipeline engine returns one averaged scalar and nothing else; so its loss function must remember. A plain
    callable, not a Module: DeepSpeed registers a Module loss on every stage.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def __call__(self, term_sums: torch.Tensor | WeightedTerms, weights: torch.Tensor) -> torch.Tensor:
        loss = None
        if isinstance(term_sums, WeightedTerms):
            loss, term_sums = term_sums
        detached = term_sums.detach().double()
        self._sums = detached if self._sums is None else self._sums + detached
        if loss is not None:
            return loss
        return weighted_sum(term_sums, weights.to(term_sums.dtype))

    def peek(self, terms: int, device: torch.device) -> torch.Tensor:
        """The sums since the last `take`, float64 [terms]; zeros on a stage that computes no loss."""
        return torch.zeros(terms, dtype=torch.float64, device=device) if self._sums is None else self._sums

    def take(self, terms: int, device: torch.device) -> torch.Tensor:
        """As `peek`, and start over."""
        sums, self._sums = self.peek(terms, device), None
        return sums
