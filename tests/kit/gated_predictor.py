"""A form of latent predictor that is not ours: h + W_out (gelu(W_gate h) * gelu(W_gate e(x)))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nextlat_dist.config.entries import PredictorEntry, Sharding


class GatedPredictor(nn.Module):
    """(h [s, b, h], e(x) [s, b, h]) -> predicted next hidden state [s, b, h]."""

    def __init__(self, transformer_config: Any, predictor_hidden_size: int, process_groups: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        size, common = transformer_config.hidden_size, {"config": transformer_config, "bias": False}
        common |= {"init_method": transformer_config.init_method, "tp_group": process_groups.tp}
        self.gate = ColumnParallelLinear(size, predictor_hidden_size, **common)
        self.out = RowParallelLinear(predictor_hidden_size, size, input_is_parallel=True, skip_bias_add=False, **common)

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        state: torch.Tensor = hidden + self.out(F.gelu(self.gate(hidden)[0]) * F.gelu(self.gate(embedded)[0]))[0]
        return state


def gated_step(
    weights: dict[str, torch.Tensor], epsilon: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    gate, out = weights["gate.weight"], weights["out.weight"]
    return lambda h, embedded: h + (F.gelu(h @ gate.t()) * F.gelu(embedded @ gate.t())) @ out.t()


ENTRY = PredictorEntry(
    name="gated",
    module="tests.kit.gated_predictor:GatedPredictor",
    drafting="tests.kit.gated_predictor:gated_step",
    parameters=lambda hidden, width: 2 * hidden * width,
    sharding={"gate.weight": Sharding(0), "out.weight": Sharding(1)},
)
