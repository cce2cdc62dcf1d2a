"""The loss terms of every objective, and from their sums to the loss.

A layer list ends in the *sums* of every term over the rows it saw: [next_token, then each group of `term_groups`, its
steps in order]. The loss is their weighted sum, with weights that hold the lambdas and one over the counts of the
*global* batch; so it does not depend on micro-batching, data-parallel size or pipeline layout, however ragged the masks
are. A term that weighs 0 is known and logged, but reaches neither the loss nor a gradient, whatever its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nextlat_dist.config.entries import resolve
from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.masks import next_token_mask


@dataclass(frozen=True)
class TermGroup:
    """One term of the loss besides next_token: a mean over what counts at each step, and then over the steps."""

    name: str
    factor: float  # its lambda
    mask: Callable[[Batch, int], torch.Tensor]  # (batch, step) -> bool [s - step, b]: what counts


def term_groups(objective: ObjectiveConfig, tokens: int = 0) -> list[TermGroup]:
    """The terms besides next_token, in their order; each has `objective.steps_ahead` steps. `tokens`: see
    `term_weights`.
    """
    return [
        TermGroup(term.name, 0.0 if term.weight is None else objective.weight(term.weight, tokens), resolve(term.mask))
        for term in objective.entry.terms
    ]


def number_of_terms(objective: ObjectiveConfig) -> int:
    """Length of the vector of terms."""
    return 1 + len(term_groups(objective)) * objective.steps_ahead


def term_counts(batch: Batch, objective: ObjectiveConfig, rows: int | None = None) -> torch.Tensor:
    """What the sums of each term over `batch` are divided by, all together: float64 [terms].

    How many positions enter it; under `objective.semantics: release`, where a micro-batch enters by its mean, how many
    micro-batches of `rows` rows (None: all are one) have any.
    """
    if objective.semantics == "paper":
        return position_counts(batch, objective)
    parts = [batch] if rows is None else batch.split(rows)
    return torch.stack([position_counts(part, objective) > 0 for part in parts]).sum(dim=0).double()


def position_counts(batch: Batch, objective: ObjectiveConfig) -> torch.Tensor:
    """How many positions of `batch` enter each term: float64 [terms]."""
    if objective.entry.counts is not None:
        counts: torch.Tensor = resolve(objective.entry.counts)(batch, objective)
        return counts
    steps = range(1, objective.steps_ahead + 1)
    masks = [group.mask(batch, step) for group in term_groups(objective) for step in steps]
    return torch.stack([mask.sum() for mask in (next_token_mask(batch), *masks)]).double()


def has_targets(counts: torch.Tensor) -> bool:
    """Whether, by global counts [terms], a token of the batch is a training target; without one there is no loss."""
    return bool(counts[0] > 0)


def term_weights(counts: torch.Tensor, objective: ObjectiveConfig, tokens: int = 0) -> torch.Tensor:
    """Weights [terms] that make `weighted_sum` the loss, from global counts [terms]; an empty term weighs 0.

    `tokens`: that were trained on before, for lambdas that change (`objective.lambda_schedule`).
    """
    steps = objective.steps_ahead
    lambdas = [
        objective.weight("lambda_next_token", tokens),
        *(group.factor / steps for group in term_groups(objective, tokens) for _ in range(steps)),
    ]
    scale = objective.entry.scale * torch.tensor(lambdas, dtype=counts.dtype, device=counts.device)
    return torch.where(counts > 0, scale / counts.clamp(min=1), torch.zeros_like(counts))


def weighted_sum(sums: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The loss, from term sums and weights [terms]; a term that weighs 0 adds nothing even when it is not finite."""
    return torch.where(weights > 0, sums * weights, torch.zeros_like(sums)).sum()


def terms_of_parts(objective: ObjectiveConfig) -> list[slice]:
    """Which terms teach what has a gradient norm and a verdict of its own: the base; then what is trained apart."""
    return [slice(None)] if objective.apart is None else [slice(0, 1), slice(1, None)]


def named_terms(
    sums: torch.Tensor, counts: torch.Tensor, objective: ObjectiveConfig, tokens: int = 0
) -> dict[str, float | None]:
    """`loss` and each unweighted term (mean over its count, then over steps) from global sums and counts; None for what
    is a mean of nothing, and for the loss where there is no target. `tokens`: see `term_weights`.
    """
    means = torch.where(counts > 0, sums / counts.clamp(min=1), torch.zeros_like(counts))
    loss = float(weighted_sum(sums, term_weights(counts, objective, tokens))) if has_targets(counts) else None
    terms: dict[str, float | None] = {"loss": loss, "next_token": float(means[0]) if has_targets(counts) else None}
    steps = objective.steps_ahead
    for number, group in enumerate(term_groups(objective)):
        part = slice(1 + number * steps, 1 + (number + 1) * steps)
        terms[group.name] = float(means[part].mean()) if bool(counts[part].any()) else None
    return terms


def terms_text(terms: Mapping[str, float | None]) -> str:
    """Terms for a person who watches the run."""
    return "  ".join(f"{name} {'null' if value is None else f'{value:.4f}'}" for name, value in terms.items())
