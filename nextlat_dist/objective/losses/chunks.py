"""The fused losses over whole batches: which rows, in which chunks, and what their gradients add up to.

Positions are taken row by row of the batch, so that t + 1 follows t; a position is then one index into [s * b].
On a CPU, positions that no mask needs are left out; on an accelerator their number is not known to the host, and asking
for it would make the host wait, so masked rows are multiplied there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nextlat_dist.objective.losses.fused import (
    ON_ACCELERATOR,
    ON_CPU,
    Sizes,
    VocabularyPass,
    WeightedTerms,
    sum_of_states,
    wide_dtype,
    with_gradients,
)
from nextlat_dist.objective.masks import masked_sum

MakePass = Callable[..., VocabularyPass]


def sizes_on(device: torch.device) -> Sizes:
    return ON_CPU if device.type == "cpu" else ON_ACCELERATOR


def rows_that_count(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the rows to be multiplied, ascending: those of a mask [rows] on a CPU, elsewhere all."""
    if mask.device.type == "cpu":
        return mask.nonzero()[:, 0]
    return torch.arange(len(mask), device=mask.device)


def safe_scale(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each row's loss in the whole: the term's weight where the mask is, else 0."""
    return torch.where(mask, weight, torch.zeros_like(weight))


def only_where(scale: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What does not count has no gradient, not even 0 times what is not finite."""
    return torch.where(scale[:, None] != 0, gradient, 0)


def weighted_loss(sums: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.where(weights > 0, sums * weights, 0).sum()


def cross_entropies(
    make_pass: MakePass,
    weight: torch.Tensor,
    states: torch.Tensor,
    targets: torch.Tensor,
    masks: list[torch.Tensor],
    weights: torch.Tensor | None,
) -> torch.Tensor | WeightedTerms:
    """Sums of the cross entropies of groups of rows, one term each.

    Args:
        make_pass: (rows, students=…, gradient=…, sizes=…) -> `VocabularyPass` over `weight`.
        weight: the head's [vocab (local), h].
        states: [rows, h], the groups one after the other.
        targets: [rows] global token ids.
        masks: what counts, of each group [rows of it].
        weights: of the terms [groups]; None where no gradient is wanted.

    Returns:
        The sums [groups] without gradient if `weights` is None, else with the loss.
    """
    wide = wide_dtype(weight.dtype)
    sizes = sizes_on(states.device)
    rows = rows_that_count(torch.cat(masks))
    values = torch.zeros(len(states), dtype=wide, device=states.device)
    scales, gradient, partial = None, None, None
    if weights is not None:
        weights = weights.to(wide)
        scales = torch.cat([safe_scale(one, mask) for one, mask in zip(weights, masks, strict=True)])
        gradient = torch.zeros_like(states)
    run = make_pass(min(sizes.chunk, max(len(rows), 1)), students=False, gradient=weights is not None, sizes=sizes)
    for chunk in rows.split(sizes.chunk):
        if not len(chunk):
            break
        read = states.detach()[chunk]
        teacher = run.teacher(read, targets[chunk])
        values[chunk] = teacher.loss
        if scales is not None and gradient is not None:
            scale = scales[chunk]
            partial, _ = run.gradient(read, teacher, scale)
            (whole,) = sum_of_states([partial], run.group)
            gradient[chunk] = only_where(scale, whole).to(gradient.dtype)
    parts = values.split([len(mask) for mask in masks])
    sums = torch.stack([masked_sum(part, mask) for part, mask in zip(parts, masks, strict=True)])
    if weights is None:
        return sums
    return with_gradients(weighted_loss(sums, weights), sums, {states: gradient, weight: run.weight_gradient})
