"""The latent predictor p_psi: h + MLP(LayerNorm(concat(h, e(x)))), its three matrices sharded over tensor-parallel
ranks.

linear_in and linear_mid are column-parallel, linear_out is row-parallel; between the first two the activations are
gathered (backward: reduce-scatter), so no rank holds or multiplies a whole matrix. arXiv 2511.05963, section on the
latent dynamics model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nextlat_dist.model.predictors import CONCAT

LAYER_NORM_EPSILON = CONCAT.norm_epsilon


class LatentPredictor(nn.Module):
    """(h [s, b, h], e(x) [s, b, h]) -> predicted next hidden state [s, b, h]."""

    def __init__(self, transformer_config: Any, predictor_hidden_size: int, process_groups: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        hidden_size, dtype = transformer_config.hidden_size, transformer_config.params_dtype
        self.tp_group = process_groups.tp
        self.layer_norm = nn.LayerNorm(2 * hidden_size, eps=LAYER_NORM_EPSILON, dtype=dtype)
        common = {
            "config": transformer_config,
            "init_method": transformer_config.init_method,
            "bias": False,
            "tp_group": self.tp_group,
        }
        self.linear_in = ColumnParallelLinear(2 * hidden_size, predictor_hidden_size, **common)
        # The gather before it already reduces the gradient of its input; a second reduction would scale it.
        self.linear_mid = ColumnParallelLinear(
            predictor_hidden_size, predictor_hidden_size, disable_grad_reduce=True, **common
        )
        self.linear_out = RowParallelLinear(
            predictor_hidden_size, hidden_size, input_is_parallel=True, skip_bias_add=False, **common
        )

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

        normed = self.layer_norm(torch.cat([hidden, embedded], dim=-1))  # [s, b, 2h]
        inner = F.gelu(self.linear_in(normed)[0])  # [s, b, H (local)]
        if self.tp_group.size() > 1:
            inner = all_gather_last_dim_from_tensor_parallel_region(inner, group=self.tp_group)  # [s, b, H]
        inner = F.gelu(self.linear_mid(inner)[0])  # [s, b, H (local)]
        update: torch.Tensor = self.linear_out(inner)[0]  # [s, b, h]
        return hidden + update
