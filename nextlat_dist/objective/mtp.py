"""Multi-token prediction: L_ntp + lambda_mtp * 1/d sum_i CE_i (Gloeckle et al. 2024, arXiv 2404.19737).

On the shared trunk's states h stand d extra transformer layers in parallel; layer i, its own norm and the shared output
head predict x_{t+1+i} at position t, from x_1 .. x_t alone. Gradients reach the extra layers, the head and the trunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nextlat_dist.model.decoder_layer import DecoderLayer
from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.masks import masked_sum, next_token_mask, token_mask
from nextlat_dist.objective.output_head import output_head


class PredictionLayer(DecoderLayer):
    """(h [s, b, h], message) -> (what the output head reads of one step ahead [s, b, h], message)."""

    def __init__(self, transformer_config: Any, layer_index: int, **decoder_layer: Any) -> None:
        super().__init__(transformer_config, layer_index, **decoder_layer)
        self.canonical_prefix = f"mtp.layers.{layer_index}"
        self.final_layernorm = nn.RMSNorm(
            transformer_config.hidden_size,
            eps=transformer_config.layernorm_epsilon,
            dtype=transformer_config.params_dtype,
        )

    def _run(self, hidden: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.final_layernorm(super()._run(hidden, message))
        return output


class MTPObjective(nn.Module):
    """ObjectiveInputs -> term sums [1 + horizon]."""

    canonical_prefix = ""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.output_layer = output_head(settings)
        self.layers = nn.ModuleList(
            PredictionLayer(layer_index=index, **settings.decoder_layer)
            for index in range(settings.config.objective.horizon)
        )

    def forward(self, inputs: ObjectiveInputs) -> torch.Tensor:
        hidden, batch = inputs.hidden, inputs.batch
        states, wanted, masks = [hidden], [batch.targets], [next_token_mask(batch)]
        for step, layer in enumerate(self.layers, start=1):
            state, _ = layer((hidden, inputs.message))
            states.append(state[:-step])  # the last positions have no target
            wanted.append(batch.targets[step:])
            masks.append(token_mask(batch, step))
        # One pass through the head: ZeRO-3 gathers its weight once, tensor ranks exchange once.
        cross_entropy, _ = self.output_layer(torch.cat(states), torch.cat(wanted), [], inputs.tied_weight)
        parts = cross_entropy.split([len(state) for state in states])
        return torch.stack([masked_sum(part, mask) for part, mask in zip(parts, masks, strict=True)])
