"""The model as one list: token embedding, decoder layers, final norm, objective.

The list runs in order inside one module (`LayerStack`), or becomes a DeepSpeed pipeline (`training.engine`). Nothing
else differs: same entries, same parameters, same canonical names. The last layer is what the objective's entry names;
nothing here knows an objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nextlat_dist.config.entries import resolve
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.decoder_layer import DecoderLayer, FinalNorm, TrunkEnd, transformer_config
from nextlat_dist.model.embedding import (
    TokenEmbedding,
    embed_apart,
    embed_for_objective,
    tie_output_head,
)
from nextlat_dist.model.initialize import initialize_parameters
from nextlat_dist.model.sharding import sharding_rules
from nextlat_dist.parallel.device import has_cuda
from nextlat_dist.parallel.dims import ParallelDims

EMBEDDING_KEY = "embedding"


@dataclass(frozen=True)
class LayerEntry:
    """One entry: what to build, and how to call it. Entries with the same `tied_key` share one module."""

    cls: type[nn.Module]
    arguments: dict[str, Any]
    tied_key: str | None = None
    forward_fn: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True)
class HeadSettings:
    """What an objective's module is built from, `module(settings)`.

    Attributes:
        transformer_config: Megatron-Core's, for layers that see the whole sequence.
        process_groups: Megatron-Core's; `tp` is the tensor-parallel group.
        decoder_layer: what a `DecoderLayer` takes besides its index: `DecoderLayer(layer_index=…, **decoder_layer)`.
        sequence_group: the ranks that have a part of the sequence each in a decoder layer; None: no such parts.
    """

    config: RunConfig
    transformer_config: Any
    process_groups: Any
    decoder_layer: dict[str, Any]
    sequence_group: Any = None


def layer_list(config: RunConfig, dims: ParallelDims, dtype: torch.dtype) -> list[LayerEntry]:
    """The whole model of `config`; parameters are created in `dtype`."""
    model, groups = config.model, dims.process_groups
    shared = transformer_config(model, dims.tensor_size, dtype)
    trunk, sequence_group = shared, None
    if config.parallel.sequence_parallel:
        trunk = transformer_config(model, dims.tensor_size, dtype, sequence_parallel=True)
        sequence_group = groups.tp
    embedding = {
        "transformer_config": shared,
        "padded_vocab_size": model.padded_vocab_size,
        "process_groups": groups,
        "scattered_over": sequence_group,
        "deterministic": config.training.deterministic and has_cuda(),
    }
    decoder_layer = {
        "transformer_config": trunk,
        "sequence_length": config.data.sequence_length,
        "rotary_base": model.rotary_base,
        "process_groups": groups,
        "recompute": config.training.recompute,
    }
    entries = [LayerEntry(TokenEmbedding, embedding, EMBEDDING_KEY)]
    for index in range(model.num_layers):
        entries.append(LayerEntry(DecoderLayer, {"layer_index": index, **decoder_layer}))
    objective, end = config.objective.entry, {"gathered_over": sequence_group}
    if objective.final_norm:
        norm = {"normalized_shape": model.hidden_size, "eps": model.norm_epsilon, "dtype": dtype}
        entries.append(LayerEntry(FinalNorm, {**end, **norm}))
    else:
        entries.append(LayerEntry(TrunkEnd, end))
    if objective.reads_embedding:
        # In a pipeline the stages add up the gradients of a tied weight, all that have it: zeros must come.
        apart = config.objective.apart is not None and dims.pipeline_size == 1
        embed = embed_apart if apart else embed_for_objective
        entries.append(LayerEntry(TokenEmbedding, embedding, EMBEDDING_KEY, embed))
    if model.tie_embeddings:
        entries.append(LayerEntry(TokenEmbedding, embedding, EMBEDDING_KEY, tie_output_head))
    settings = HeadSettings(config, shared, groups, decoder_layer, sequence_group)
    if objective.before is not None:
        entries += resolve(objective.before)(settings, entries[0])
    return [*entries, LayerEntry(resolve(objective.module), {"settings": settings})]


class LayerStack(nn.Module):
    """The list as one module: message of a batch -> term sums [terms]."""

    def __init__(self, entries: list[LayerEntry]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self._calls: list[tuple[int, Callable[[Any, Any], Any] | None]] = []
        tied: dict[str, int] = {}
        for entry in entries:
            if entry.tied_key is None or entry.tied_key not in tied:
                self.layers.append(entry.cls(**entry.arguments))
                if entry.tied_key is not None:
                    tied[entry.tied_key] = len(self.layers) - 1
            index = len(self.layers) - 1 if entry.tied_key is None else tied[entry.tied_key]
            self._calls.append((index, entry.forward_fn))

    def run(self, message: torch.Tensor, stop: int | None = None) -> Any:
        """The output of the list's first `stop` entries (None: all; -1: all but the objective)."""
        value: Any = message
        for index, forward_fn in self._calls[:stop]:
            layer = self.layers[index]
            value = layer(value) if forward_fn is None else forward_fn(layer, value)
        return value

    def forward(self, message: torch.Tensor) -> torch.Tensor:
        sums: torch.Tensor = self.run(message)
        return sums


def initialize(module: nn.Module, config: RunConfig, dims: ParallelDims) -> None:
    """Draw the weights of every layer that `module` holds; see `model.initialize`."""
    initialize_parameters(
        module,
        sharding_rules(config),
        seed=config.training.seed,
        std=config.model.init_method_std,
        num_layers=config.model.num_layers,
        tensor_rank=dims.tensor_rank,
        tensor_size=dims.tensor_size,
    )
