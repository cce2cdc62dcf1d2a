"""An objective with a replicated weight that acts on sharded heads, as the norms of QK-norm do."""

from __future__ import annotations

import torch
from torch import nn

from nextlat_dist.config.entries import ObjectiveEntry, Sharding
from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.masks import masked_sum, next_token_mask
from nextlat_dist.objective.output_head import output_head


class ScaledHeads(nn.Module):
    """Next-token prediction from h + W_out (scale * W_in h), heads sharded over tensor ranks, one `scale` for all."""

    canonical_prefix = ""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        model, shared = settings.config.model, settings.transformer_config
        size, self.head_size = model.hidden_size, model.hidden_size // model.num_attention_heads
        common = {
            "config": shared,
            "init_method": shared.init_method,
            "bias": False,
            "tp_group": settings.process_groups.tp,
        }
        self.output_layer = output_head(settings)
        self.heads_in = ColumnParallelLinear(size, size, **common)
        self.heads_out = RowParallelLinear(size, size, input_is_parallel=True, skip_bias_add=False, **common)
        self.heads_norm = nn.Module()
        self.heads_norm.weight = nn.Parameter(torch.ones(self.head_size, dtype=shared.params_dtype))

    def forward(self, inputs: ObjectiveInputs) -> torch.Tensor:
        heads = self.heads_in(inputs.hidden)[0].unflatten(-1, (-1, self.head_size))  # [s, b, heads (local), size]
        hidden = inputs.hidden + self.heads_out((heads.tanh() * self.heads_norm.weight).flatten(-2))[0]
        cross_entropy, _ = self.output_layer(hidden, inputs.batch.targets, [], inputs.tied_weight)
        return masked_sum(cross_entropy, next_token_mask(inputs.batch))[None]


ENTRY = ObjectiveEntry(
    name="scaled_heads",
    module="tests.kit.partial_objective:ScaledHeads",
    steps_ahead=lambda objective: 0,
    sharding=lambda config: {
        "heads_in.weight": Sharding(0),
        "heads_out.weight": Sharding(1),
        "heads_norm.weight": Sharding(None, partial=True),
    },
)
