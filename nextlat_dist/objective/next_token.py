"""The baseline objective: next-token prediction alone."""

from __future__ import annotations

import torch
from torch import nn

from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.masks import masked_sum, next_token_mask
from nextlat_dist.objective.output_head import output_head


class NextTokenObjective(nn.Module):
    """ObjectiveInputs -> term sums [1]."""

    canonical_prefix = ""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.output_layer = output_head(settings)

    def forward(self, inputs: ObjectiveInputs) -> torch.Tensor:
        batch = inputs.batch
        cross_entropy, _ = self.output_layer(inputs.hidden, batch.targets, [], inputs.tied_weight)
        return masked_sum(cross_entropy, next_token_mask(batch))[None]
