"""From sums of loss terms to the loss.

A layer list ends in the *sums* of every term over the rows it saw. The loss is their weighted sum, with weights that
hold the lambdas and one over the counts of the *global* batch; so it does not depend on micro-batching, data-parallel
size or pipeline layout, however ragged the masks are.
"""

from __future__ import annotations

import torch

from nextlat_dist.config.schema import ObjectiveConfig


def term_weights(counts: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """Weights [1 + 2d] such that (sums * weights).sum() is the loss, from global counts [1 + 2d]; an empty term weighs
    0.
    """
    steps = objective.rollout_steps
    lambdas = [1.0]
    for factor in (objective.lambda_hidden, objective.lambda_kl):
        lambdas += [factor / steps for _ in range(steps)]
    scale = torch.tensor(lambdas, dtype=counts.dtype, device=counts.device)
    return torch.where(counts > 0, scale / counts.clamp(min=1), torch.zeros_like(counts))


def named_terms(sums: torch.Tensor, counts: torch.Tensor, objective: ObjectiveConfig) -> dict[str, float]:
    """`loss` and each unweighted term (mean over its count, then over rollout steps) from global sums and counts."""
    steps = objective.rollout_steps
    means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.zeros_like(counts))
    terms = {"loss": float((sums * term_weights(counts, objective)).sum()), "next_token": float(means[0])}
    if steps:
        terms["hidden"] = float(means[1 : 1 + steps].mean())
        terms["kl"] = float(means[1 + steps :].mean())
    return terms


class LossRecorder:
    """`loss_fn(term sums, weights) -> loss`, remembering the sums since the last `take`.

    A plain callable, not a Module: DeepSpeed registers a Module loss on every stage. Its memory is how the terms leave
    a pipeline, whose engine returns one averaged scalar.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def __call__(self, term_sums: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        detached = term_sums.detach().double()
        self._sums = detached if self._sums is None else self._sums + detached
        return (term_sums * weights.to(term_sums.dtype)).sum()

    def peek(self, terms: int, device: torch.device) -> torch.Tensor:
        """The sums since the last `take`, float64 [terms]; zeros on a stage that computes no loss."""
        return torch.zeros(terms, dtype=torch.float64, device=device) if self._sums is None else self._sums

    def take(self, terms: int, device: torch.device) -> torch.Tensor:
        """As `peek`, and begin anew."""
        sums, self._sums = self.peek(terms, device), None
        return sums
