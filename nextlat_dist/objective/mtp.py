"""Multi-token prediction: L_ntp + lambda_mtp * 1/d sum_i CE_i (Gloeckle et al. 2024, arXiv 2404.19737).

On the shared trunk's states h stand d extra transformer layers in parallel; layer i, its own norm and the shared output
head predict x_{t+1+i} at position t, from x_1 .. x_t alone. Gradients reach the extra layers, the head and the trunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nextlat_dist.model.decoder_layer import DecoderLayer, gather_sequence, scatter_sequence
from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.fused_objective import FusedObjective
from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.masks import masked_sum, next_token_mask, token_mask
from nextlat_dist.objective.output_head import output_head


class PredictionLayer(DecoderLayer):
    """(h [s, b, h], message) -> (what the output head reads of one step ahead [s, b, h], message)."""

    def __init__(
        self, transformer_config: Any, layer_index: int, sequence_group: Any = None, **decoder_layer: Any
    ) -> None:
        super().__init__(transformer_config, layer_index, **decoder_layer)
        self.canonical_prefix = f"mtp.layers.{layer_index}"
        self._sequence_group = sequence_group
        self.final_layernorm = nn.RMSNorm(
            transformer_config.hidden_size,
            eps=transformer_config.layernorm_epsilon,
            dtype=transformer_config.params_dtype,
        )

    def _run(self, hidden: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
        part = super()._run(scatter_sequence(hidden, self._sequence_group), message)
        return gather_sequence(self.final_layernorm(part), self._sequence_group)


class MTPObjective(FusedObjective):
    """ObjectiveInputs -> term sums [1 + horizon], with the loss where it is fused."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings.config)
        self.output_layer = output_head(settings)
        self.layers = nn.ModuleList(
            PredictionLayer(layer_index=index, sequence_group=settings.sequence_group, **settings.decoder_layer)
            for index in range(settings.config.objective.horizon)
        )

    def in_chunks(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        states, wanted, masks = self._ahead(inputs)
        return self.cross_entropies(inputs.tied_weight, torch.cat(states), torch.cat(wanted), masks)

    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        states, wanted, masks = self._ahead(inputs)
        # One pass through the head: ZeRO-3 gathers its weight once, tensor ranks exchange once.
        cross_entropy, _ = self.output_layer(torch.cat(states), torch.cat(wanted), [], inputs.tied_weight)
        parts = cross_entropy.split([len(state) for state in states])
        return torch.stack([masked_sum(part, mask) for part, mask in zip(parts, masks, strict=True)])

    def _ahead(self, inputs: ObjectiveInputs) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """States, targets and masks of x_{t+1}, x_{t+2}, …: [s, b, h] and [s, b], [s - 1, b, h] and [s - 1, b], …"""
        hidden, batch = inputs.hidden, inputs.batch
        states, wanted, masks = [hidden], [batch.targets], [next_token_mask(batch)]
        for step, layer in enumerate(self.layers, start=1):
            state, _ = layer((hidden, inputs.message))
            states.append(state[:-step])  # the last positions have no target
            wanted.append(batch.targets[step:])
            masks.append(token_mask(batch, step))
        return states, wanted, masks
