"""The base model of `objective: jtp`: a Llama whose next token comes through Fetch (`objective.jtp.fetch`).

A state has three parts side by side, [g; h; c]: g is what the output head reads of the next token, h what the last
layer hands over, c what Fetch read of x_t: the last two are what a drafter goes on from.
Equals the transformers class of `integrations.jtp` to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.inference.engine.graphs import StaticLlama
from nextlat_dist.inference.engine.linear import linear
from nextlat_dist.inference.engine.llama import Block, KeyValueCache, Llama

LAYER_NORM_EPSILON = 1e-5  # as `objective.jtp.fetch` trains it


class FetchWeights:
    """Fetch on one device, taken apart into what one place needs."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> None:
        """`weights`: the base's, cast and moved."""
        self.heads = config.own["fetch_heads"]
        self.scale = weights["fetch.scale"]
        self._norm = weights["fetch.layer_norm.weight"], weights["fetch.layer_norm.bias"]
        query, key, value = weights["fetch.linear_qkv"].chunk(3)
        self.query, self.key, self.value = linear(query), linear(key), linear(value)
        self.out = linear(weights["fetch.linear_proj"])
        self.relative_bias = weights["fetch.relative_bias"]

    def read(self, h: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """c(h, e) [rows, hidden]."""
        weight, bias = self._norm
        return functional.layer_norm(embedded + self.scale * h, weight.shape, weight, bias, LAYER_NORM_EPSILON)

    def first(self, c: torch.Tensor) -> torch.Tensor:
        """Output 0 [rows, hidden]: the one place there is attends to itself."""
        return self.out(self.value(c))


class _Fetching(Llama):
    """What both engines have in common."""

    def _prepare(self, weights: dict[str, torch.Tensor]) -> None:
        own = {name: tensor.to(self.embedding) for name, tensor in weights.items() if name.startswith("fetch.")}
        self.fetch = FetchWeights(self.config, own)

    @property
    def state_size(self) -> int:
        return 3 * self.config.hidden_size

    def run(self, tokens: torch.Tensor, block: Block, cache: KeyValueCache) -> torch.Tensor:
        h = self.trunk(tokens, block, cache)
        c = self.fetch.read(h, functional.embedding(tokens, self.embedding))
        return torch.cat([self.normed(self.fetch.first(c)), h, c], dim=-1)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        return super().logits(h[..., : self.config.hidden_size])


class FetchLlama(_Fetching):
    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> None:
        super().__init__(config, weights, device, dtype)
        self._prepare(weights)


class StaticFetchLlama(_Fetching, StaticLlama):
    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], *arguments: Any, capture: bool) -> None:
        StaticLlama.__init__(self, config, weights, *arguments, capture=capture)
        self._prepare(weights)
