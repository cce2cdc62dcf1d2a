"""The split of each named parameter over tensor-parallel ranks: one table for initialisation, checkpoints and export.

Names are canonical (Megatron-Core's GPT names, `decoder.layers.3.mlp.linear_fc1.weight`), the same under every layout.
A rule holds for a whole name, `*` standing for one part between dots; what an objective or a predictor adds, its entry
rules. `shard` and `merge` are inverse to each other. Torch-free at import: entries and the plan read it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nextlat_dist.config.entries import OBJECTIVES, Sharding
from nextlat_dist.config.schema import ObjectiveConfig, RunConfig

if TYPE_CHECKING:
    import torch

__all__ = [
    "REPLICATED",
    "Rules",
    "Sharding",
    "decoder_layer_sharding",
    "merge",
    "norm_sharding",
    "shard",
    "sharding_of",
    "sharding_rules",
]

Rules = Mapping[str, Sharding]

REPLICATED = Sharding(None)


def norm_sharding(config: RunConfig) -> Sharding:
    """Of a norm inside the trunk: whole on every rank, of the whole sequence or of a part."""
    return Sharding(None, partial=config.parallel.sequence_parallel)


def decoder_layer_sharding(config: RunConfig, prefix: str) -> Rules:
    """The rules of a decoder layer's parameters, each name after `prefix`."""
    rules = {
        "input_layernorm.weight": norm_sharding(config),
        "self_attention.linear_qkv.weight": Sharding(0),
        "self_attention.linear_proj.weight": Sharding(1),
        "pre_mlp_layernorm.weight": norm_sharding(config),
        "mlp.linear_fc1.weight": Sharding(0, blocks=2),
        "mlp.linear_fc2.weight": Sharding(1),
    }
    return {f"{prefix}.{name}": rule for name, rule in rules.items()}


def sharding_rules(config: RunConfig | None = None) -> Rules:
    """The rules of all parameters of `config`'s model; None: of every built-in objective's."""
    if config is None:
        return _built_in_rules()
    return {
        "embedding.word_embeddings.weight": Sharding(0),
        **decoder_layer_sharding(config, "decoder.layers.*"),
        "decoder.final_layernorm.weight": norm_sharding(config),
        "output_layer.weight": Sharding(0),
        **config.objective.entry.sharding(config),
    }


@functools.cache
def _built_in_rules() -> Rules:
    rules = dict(sharding_rules(RunConfig()))
    for name, entry in OBJECTIVES.built_in().items():
        rules |= entry.sharding(RunConfig(objective=ObjectiveConfig(name=name)))
    return rules


def sharding_of(name: str, rules: Rules | None = None) -> Sharding:
    """The rule for a canonical parameter name; an unlisted name is a programming error, never a silent default.

    Args:
        rules: of the model that has the parameter (`sharding_rules`); None: of every built-in objective's.
    """
    for pattern, sharding in (sharding_rules() if rules is None else rules).items():
        if _pattern(pattern).fullmatch(name):
            return sharding
    raise AssertionError(f"no sharding rule for parameter {name!r}; the entry that adds it must give one")


@functools.cache
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


def shard(full: torch.Tensor, sharding: Sharding, rank: int, size: int) -> torch.Tensor:
    """Rank `rank`'s part of `full`."""
    import torch

    if sharding.dim is None or size == 1 or not sharding.splits(size):
        return full
    blocks = full.chunk(sharding.blocks, dim=sharding.dim)
    return torch.cat([block.chunk(size, dim=sharding.dim)[rank] for block in blocks], dim=sharding.dim).contiguous()


def merge(shards: list[torch.Tensor], sharding: Sharding) -> torch.Tensor:
    """The full tensor from all ranks' parts, in rank order."""
    import torch

    if sharding.dim is None or len(shards) == 1:
        return shards[0]
    dim = sharding.dim
    split = [part.chunk(sharding.blocks, dim=dim) for part in shards]
    return torch.cat([parts[block] for block in range(sharding.blocks) for parts in split], dim=dim).contiguous()
