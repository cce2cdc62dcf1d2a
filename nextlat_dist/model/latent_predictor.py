"""The latent predictor p_psi: h + MLP(LayerNorm(concat(h, e(x)))), its three matrices sharded over tensor-parallel
ranks.

linear_in and linear_mid are column-parallel, linear_out is row-parallel; between the first two the activations are
gathered (backward: reduce-scatter), so no rank holds or multiplies a whole matrix. arXiv 2511.05963, section on the
latent dynamics model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nextlat_dist.model.predictors import CONCAT

LAYER_NORM_EPSILON = CONCAT.norm_epsilon


class ReadToken(NamedTuple):
    """What the predictor takes from a token that it is fed; positions come first.

    Attributes:
        product: of the half of the first matrix that reads e(x) [..., H (local)].
        mean, spread: of e(x) over its elements: mean and sum of squared deviations [..., 1].
    """

    product: torch.Tensor
    mean: torch.Tensor
    spread: torch.Tensor


class FirstMatrix(NamedTuple):
    """The predictor's first matrix with the gain of the norm before it.

    Attributes:
        of_hidden: the half that reads h [H (local), h].
        sums: of the rows of both halves [H (local)], fp32 or wider.
        bias: its product of the norm's bias [H (local)], fp32 or wider.
    """

    of_hidden: torch.Tensor
    sums: torch.Tensor
    bias: torch.Tensor


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
        return self.step(hidden, *self.read(embedded))

    def read(self, embedded: torch.Tensor) -> tuple[ReadToken, FirstMatrix]:
        """What `step` needs of e(x) [..., h] and of the weights, computed once for all states that are fed a token.

        With x = (h, e(x)), mean m and deviation s, the first matrix W sees (x - m) / s * gain + bias. Its product is
        that of each half with W * gain, less m times the sums of its rows, over s, plus W bias.
        """
        embedded = self._summed_backwards(embedded)
        weight, norm = self.linear_in.weight, self.layer_norm
        wide = _wide(weight)
        with_gain = weight * self._summed_backwards(norm.weight)
        of_hidden, of_embedded = with_gain.chunk(2, dim=1)
        bias = (wide * self._summed_backwards(norm.bias)).sum(dim=1)
        shared = FirstMatrix(of_hidden, _wide(with_gain).sum(dim=1), bias)
        return ReadToken(F.linear(embedded, of_embedded), *_mean_and_spread(embedded)), shared

    def step(self, hidden: torch.Tensor, token: ReadToken, first: FirstMatrix) -> torch.Tensor:
        """h [..., h] and the token that follows -> the next h [..., h]."""
        from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

        given, size = hidden, hidden.shape[-1]
        hidden = self._summed_backwards(hidden)
        mean, spread = _mean_and_spread(hidden)
        apart = mean - token.mean
        variance = (spread + token.spread + 0.5 * size * apart * apart) / (2 * size)
        scale = torch.rsqrt(variance + self.layer_norm.eps)
        product = _wide(F.linear(hidden, first.of_hidden)) + _wide(token.product)
        product = (product - 0.5 * (mean + token.mean) * first.sums) * scale + first.bias
        inner = F.gelu(product.to(given.dtype))  # [..., H (local)]
        if self.tp_group.size() > 1:
            inner = all_gather_last_dim_from_tensor_parallel_region(inner, group=self.tp_group)  # [..., H]
        inner = F.gelu(self.linear_mid(inner)[0])  # [..., H (local)]
        update: torch.Tensor = self.linear_out(inner)[0]  # [..., h]
        return given + update

    def _summed_backwards(self, whole: torch.Tensor) -> torch.Tensor:
        """What every rank has, before each makes its part of the first product of it: gradients are summed."""
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        if self.tp_group.size() == 1:
            return whole
        copy: torch.Tensor = copy_to_tensor_model_parallel_region(whole, group=self.tp_group)
        return copy


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """fp32 or wider."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _mean_and_spread(half: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum of squared deviations from it [..., 1], fp32 or wider."""
    wide = _wide(half)
    mean = wide.mean(dim=-1, keepdim=True)
    return mean, (wide - mean).square().sum(dim=-1, keepdim=True)
