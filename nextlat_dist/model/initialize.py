"""Canonical names and initial weights.

Every parameter is drawn whole from a generator seeded by (seed, canonical name) and then cut by the sharding table, one
parameter at a time on the CPU. So initial weights depend neither on tensor, pipeline or data parallelism nor on which
other layers exist: a GPT twin starts from the very base weights of its NextLat twin.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from nextlat_dist.model.sharding import Rules, shard, sharding_of


def canonical_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of every parameter on this rank, each once, whatever container holds the layers.

    A layer's `canonical_prefix` names its parameters, unless a layer inside it has one of its own.
    """
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for layer in module.modules():  # outer ones first
        prefix = getattr(layer, "canonical_prefix", None)
        if prefix is None:
            continue
        for name, parameter in layer.named_parameters():
            local = name.removeprefix("layer.")
            named[id(parameter)] = (f"{prefix}.{local}" if prefix else local, parameter)
    yield from named.values()


def initialize_parameters(
    module: nn.Module, rules: Rules, *, seed: int, std: float, num_layers: int, tensor_rank: int, tensor_size: int
) -> None:
    """Draw every weight of `module` and mark the sharded ones for DeepSpeed's gradient norm.

    A parameter with an `initial_value` begins as that. Norm weights are 1 and biases 0; matrices are normal with
    `std`, those that write to the residual stream with std / sqrt(2 * num_layers) (Megatron-Core's scaled
    initialisation).
    """
    for name, parameter in canonical_parameters(module):
        sharding = sharding_of(name, rules)
        split = sharding.splits(tensor_size)
        if split:
            # DeepSpeed counts unmarked parameters on tensor rank 0 only.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = sharding.dim  # type: ignore[attr-defined]
            parameter.partition_stride = sharding.blocks  # type: ignore[attr-defined]
        constant = getattr(parameter, "initial_value", None)
        if constant is not None:
            nn.init.constant_(parameter, constant)
            continue
        if parameter.ndim == 1:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            continue
        shape = list(parameter.shape)
        if split:
            assert sharding.dim is not None
            shape[sharding.dim] *= tensor_size
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / math.sqrt(2 * num_layers) if residual else std
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        full = torch.empty(shape).normal_(0.0, scale, generator=generator)
        with torch.no_grad():
            parameter.copy_(shard(full, sharding, tensor_rank, tensor_size))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
