"""The baseline objective: next-token prediction alone."""

from __future__ import annotations

import torch

from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.fused_objective import FusedObjective
from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.masks import masked_sum, next_token_mask
from nextlat_dist.objective.output_head import output_head


class NextTokenObjective(FusedObjective):
    """ObjectiveInputs -> term sums [1], with the loss where it is fused."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings.config)
        self.output_layer = output_head(settings)

    def in_chunks(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        return self.cross_entropies(
            inputs.tied_weight, inputs.hidden, inputs.batch.targets, [next_token_mask(inputs.batch)]
        )

    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        batch = inputs.batch
        cross_entropy, _ = self.output_layer(inputs.hidden, batch.targets, [], inputs.tied_weight)
        return masked_sum(cross_entropy, next_token_mask(batch))[None]
