"""Joint multi-token prediction: L_ntp + lambda_jtp * 1/d sum_i CE_i (Ahn et al. 2025, arXiv 2503.21801).

Here h_t is what the last decoder layer hands over, before the final norm. Fetch reads h_t and x_t .. x_{t+d}: its
output 0 predicts the next token; to its outputs i = 1 .. d h_t is added, and they predict x_{t+1+i}, fed the true
tokens up to x_{t+i}. All go through the model's one final norm and output head. So the base is no plain Llama: even
the next token comes from Fetch. Gradients reach everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nextlat_dist.config.schema import fetch_heads
from nextlat_dist.model.decoder_layer import FinalNorm
from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.fused_objective import FusedObjective
from nextlat_dist.objective.jtp.fetch import Fetch
from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.masks import masked_sum, next_token_mask, token_mask
from nextlat_dist.objective.output_head import output_head


class JTPObjective(FusedObjective):
    """ObjectiveInputs, with the embedding and without a final norm -> term sums [1 + horizon], with the loss where it
    is fused.
    """

    def __init__(self, settings: HeadSettings) -> None:
        config = settings.config
        super().__init__(config)
        model, dtype = config.model, settings.transformer_config.params_dtype
        self.horizon = config.objective.horizon
        self.output_layer = output_head(settings)
        heads = fetch_heads(model.num_attention_heads)
        self.fetch = Fetch(model.hidden_size, heads, self.horizon, dtype, settings.process_groups.tp)
        self.final_layernorm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon, dtype=dtype)
        self.final_layernorm.canonical_prefix = FinalNorm.canonical_prefix  # type: ignore[assignment]

    def in_chunks(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        states, wanted, masks = self._ahead(inputs)
        return self.cross_entropies(inputs.tied_weight, torch.cat(states), torch.cat(wanted), masks)

    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        states, wanted, masks = self._ahead(inputs)
        cross_entropy, _ = self.output_layer(torch.cat(states), torch.cat(wanted), [], inputs.tied_weight)
        parts = cross_entropy.split([len(state) for state in states])
        return torch.stack([masked_sum(part, mask) for part, mask in zip(parts, masks, strict=True)])

    def next_token_states(self, inputs: ObjectiveInputs) -> torch.Tensor:
        """What the head reads of the next token [s, b, h]."""
        return self.states(inputs)[0]

    def states(self, inputs: ObjectiveInputs) -> list[torch.Tensor]:
        """What the head reads of x_{t+1}, x_{t+2}, …: [s, b, h], [s - 1, b, h], …"""
        hidden, embedded = inputs.hidden, inputs.embedded
        assert embedded is not None
        # What is beyond the row's end is never read by an output that counts: nothing comes back from a later place.
        ahead = [F.pad(embedded[step:], (0, 0, 0, 0, 0, step)) for step in range(self.horizon + 1)]
        read = torch.stack(ahead, dim=2).flatten(0, 1)
        outputs = self.fetch(hidden.flatten(0, 1), read).unflatten(0, hidden.shape[:2]).unbind(dim=2)
        length = len(hidden)
        own = [outputs[0]]
        own += [output[: length - step] + hidden[: length - step] for step, output in enumerate(outputs[1:], start=1)]
        return [self.final_layernorm(state) for state in own]

    def _ahead(self, inputs: ObjectiveInputs) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """States, targets and masks of x_{t+1}, x_{t+2}, …"""
        batch = inputs.batch
        steps = range(1, self.horizon + 1)
        wanted = [batch.targets, *(batch.targets[step:] for step in steps)]
        return self.states(inputs), wanted, [next_token_mask(batch), *(token_mask(batch, step) for step in steps)]
