"""Objectives that form their gradients in the forward pass: they must know the weights of their terms before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import nn

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.losses.chunks import cross_entropies
from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.output_head import OutputHead
from nextlat_dist.objective.terms import position_counts


class FusedObjective(nn.Module, ABC):
    """An objective that has both forms of its losses: `in_chunks`, and `whole`.

    A subclass with a `forward` of its own that calls this one gets the sums of `whole`, which carry gradients.

    Attributes:
        output_layer: the head.
        term_weights: of the term sums [terms] in the loss of the global batch, set before every training step.
        fused: whether to use them; else losses and gradients go through whole logits.

    Under `objective.semantics: release` it gives the means over its micro-batch instead of sums.
    """

    canonical_prefix = ""
    output_layer: OutputHead

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.fused = config.training.fused_losses
        self.term_weights: torch.Tensor | None = None
        self._means = config.objective if config.objective.semantics == "release" else None

    def forward(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        if self._means is None:
            return self._sums(inputs)
        counts = position_counts(inputs.batch, self._means)
        shares, weights = counts.clamp(min=1).reciprocal(), self.term_weights
        try:
            self.term_weights = None if weights is None else weights * shares.to(weights)
            found = self._sums(inputs)
        finally:
            self.term_weights = weights
        if isinstance(found, WeightedTerms):
            return found._replace(sums=found.sums * shares.to(found.sums))
        return found * shares.to(found)

    def _sums(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        return self.in_chunks(inputs) if self.uses_fused else self.whole(inputs)

    @abstractmethod
    def in_chunks(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        """Term sums [terms], with the loss where a gradient is wanted."""

    @abstractmethod
    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """Term sums [terms], with gradients by autograd through logits of all positions."""

    @property
    def uses_fused(self) -> bool:
        """Without weights there is no gradient to form, so somebody else's backward pass must find a graph."""
        own = type(self).forward is not FusedObjective.forward
        return self.fused and not own and (self.term_weights is not None or not torch.is_grad_enabled())

    @property
    def wanted_weights(self) -> torch.Tensor | None:
        """None where no gradient is wanted."""
        return self.term_weights if torch.is_grad_enabled() else None

    def cross_entropies(
        self, tied_weight: torch.Tensor | None, states: torch.Tensor, targets: torch.Tensor, masks: list[torch.Tensor]
    ) -> torch.Tensor | WeightedTerms:
        """States [n, b, h] and their targets [n, b], of which each mask [m, b] covers the next m -> its sum.

        The masks are those of the first terms.
        """
        weights = self.wanted_weights
        return cross_entropies(
            partial(self.output_layer.vocabulary_pass, tied_weight),
            self.output_layer.weight_of(tied_weight),
            states.flatten(0, 1),
            targets.flatten(),
            [mask.flatten() for mask in masks],
            None if weights is None else weights[: len(masks)],
        )

    def read_directly(self) -> list[nn.Module]:
        """Modules whose weights the fused losses read without calling them, hooks and all."""
        return [self.output_layer]


def set_term_weights(module: nn.Module, weights: torch.Tensor | None) -> None:
    """Tell the objective in `module`, if it is there and of this kind, the weights of its terms."""
    for part in module.modules():
        if isinstance(part, FusedObjective):
            part.term_weights = weights
