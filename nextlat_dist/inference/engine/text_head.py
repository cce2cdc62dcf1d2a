"""The base model of `objective: bst`: a Llama whose states go through the text head, given that the text ends.

What comes after is not known, so the other half of the text head's input is the state of the end token alone, a
constant of the export. Equals the transformers class of `integrations.bst` to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.huggingface.forms.catalogue import CONDITION
from nextlat_dist.inference.engine.graphs import StaticLlama
from nextlat_dist.inference.engine.linear import linear
from nextlat_dist.inference.engine.llama import Llama


class _TextHead(Llama):
    """What both engines have in common: the final norm is followed by the text head."""

    def _prepare(self, weights: dict[str, torch.Tensor]) -> None:
        own = {name: tensor.to(self.embedding) for name, tensor in weights.items() if name.startswith("text_head.")}
        fc1, hidden = own["text_head.linear_fc1"], self.config.hidden_size
        # The half of the first matrix that reads the condition makes a constant.
        self._of_condition = fc1[:, hidden:] @ own[CONDITION]
        self._fc1 = linear(fc1[:, :hidden].contiguous())
        self._fc2 = linear(own["text_head.linear_fc2"])
        self._gain = own["text_head.layer_norm.weight"]
        self._condition = own[CONDITION]

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        f = super().normed(x)
        gate, up = (self._fc1(f) + self._of_condition).chunk(2, dim=-1)
        update = self._fc2(functional.silu(gate) * up)
        both = torch.cat([f, self._condition.expand_as(f)], dim=-1) + update
        normed = functional.rms_norm(both, self._gain.shape, self._gain, self.config.rms_norm_eps)
        return normed[..., : self.config.hidden_size].contiguous()


class TextHeadLlama(_TextHead):
    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> None:
        super().__init__(config, weights, device, dtype)
        self._prepare(weights)


class StaticTextHeadLlama(_TextHead, StaticLlama):
    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], *arguments: Any, capture: bool) -> None:
        StaticLlama.__init__(self, config, weights, *arguments, capture=capture)
        self._prepare(weights)
