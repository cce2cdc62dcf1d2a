"""How each named parameter is split over tensor-parallel ranks: one table for initialisation, checkpoints and export.

Names are canonical (Megatron-Core's GPT names, `decoder.layers.3.mlp.linear_fc1.weight`), the same under every layout.
`shard` and `merge` are inverse to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sharding:
    """`dim` is None for a parameter that every rank holds whole. `blocks` equal blocks along `dim` are split one by
    one:
    a gated `linear_fc1` is [gate; up] on every rank, so its two halves are sharded separately."""

    dim: int | None
    blocks: int = 1


REPLICATED = Sharding(None)
_RULES: tuple[tuple[str, Sharding], ...] = (
    ("word_embeddings.weight", Sharding(0)),
    ("output_layer.weight", Sharding(0)),
    ("linear_qkv.weight", Sharding(0)),
    ("linear_proj.weight", Sharding(1)),
    ("linear_fc1.weight", Sharding(0, blocks=2)),
    ("linear_fc2.weight", Sharding(1)),
    ("latent_predictor.linear_in.weight", Sharding(0)),
    ("latent_predictor.linear_mid.weight", Sharding(0)),
    ("latent_predictor.linear_out.weight", Sharding(1)),
    ("layernorm.weight", REPLICATED),
    ("latent_predictor.layer_norm.weight", REPLICATED),
    ("latent_predictor.layer_norm.bias", REPLICATED),
)


def sharding_of(name: str) -> Sharding:
    """The rule for a canonical parameter name; an unlisted name is a programming error, never a silent default."""
    for suffix, sharding in _RULES:
        if name.endswith(suffix):
            return sharding
    raise AssertionError(f"no sharding rule for parameter {name!r}; add it to {__name__}")


def shard(full: torch.Tensor, sharding: Sharding, rank: int, size: int) -> torch.Tensor:
    """Rank `rank`'s part of `full`."""
    if sharding.dim is None or size == 1:
        return full
    blocks = full.chunk(sharding.blocks, dim=sharding.dim)
    return torch.cat([block.chunk(size, dim=sharding.dim)[rank] for block in blocks], dim=sharding.dim).contiguous()


def merge(shards: list[torch.Tensor], sharding: Sharding) -> torch.Tensor:
    """The full tensor from all ranks' parts, in rank order."""
    if sharding.dim is None or len(shards) == 1:
        return shards[0]
    dim = sharding.dim
    split = [part.chunk(sharding.blocks, dim=dim) for part in shards]
    return torch.cat([parts[block] for block in range(sharding.blocks) for parts in split], dim=dim).contiguous()
