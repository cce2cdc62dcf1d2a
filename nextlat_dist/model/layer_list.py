"""The model as one list: token embedding, decoder layers, final norm, objective.

The list runs in order inside one module (`LayerStack`), or becomes a DeepSpeed pipeline (`training.build`). Nothing
else differs: same entries, same parameters, same canonical names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.model.decoder_layer import DecoderLayer, FinalNorm, transformer_config
from nextlat_dist.model.embedding import TokenEmbedding, embed_for_predictor, lend_weight
from nextlat_dist.model.initialize import initialize_parameters
from nextlat_dist.objective.mtp import MTPObjective
from nextlat_dist.objective.next_token import NextTokenObjective
from nextlat_dist.objective.nextlat import NextLatObjective
from nextlat_dist.parallel.dims import ParallelDims

EMBEDDING_KEY = "embedding"


@dataclass(frozen=True)
class LayerEntry:
    """One entry: what to build, and how to call it. Entries with the same `tied_key` share one module."""

    cls: type[nn.Module]
    arguments: dict[str, Any]
    tied_key: str | None = None
    forward_fn: Callable[[Any, Any], Any] | None = None


def layer_list(config: RunConfig, dims: ParallelDims, dtype: torch.dtype) -> list[LayerEntry]:
    """The whole model of `config`; parameters are created in `dtype`."""
    model, groups = config.model, dims.process_groups
    shared = transformer_config(model, dims.tensor_size, dtype)
    embedding = {
        "transformer_config": shared,
        "padded_vocab_size": model.padded_vocab_size,
        "process_groups": groups,
    }
    head = {**embedding, "vocab_size": model.vocab_size, "tied": model.tie_embeddings}
    decoder_layer = {
        "sequence_length": config.data.sequence_length,
        "rotary_base": model.rotary_base,
        "process_groups": groups,
        "activation_checkpointing": config.training.activation_checkpointing,
    }
    entries = [LayerEntry(TokenEmbedding, embedding, EMBEDDING_KEY)]
    for index in range(model.num_layers):
        entries.append(LayerEntry(DecoderLayer, {"transformer_config": shared, "layer_index": index, **decoder_layer}))
    entries.append(
        LayerEntry(FinalNorm, {"normalized_shape": model.hidden_size, "eps": model.norm_epsilon, "dtype": dtype})
    )
    if config.objective.name == "nextlat":
        entries.append(LayerEntry(TokenEmbedding, embedding, EMBEDDING_KEY, embed_for_predictor))
    if model.tie_embeddings:
        entries.append(LayerEntry(TokenEmbedding, embedding, EMBEDDING_KEY, lend_weight))
    horizon = config.objective.horizon
    objectives = {
        "next_token": LayerEntry(NextTokenObjective, head),
        "nextlat": LayerEntry(
            NextLatObjective,
            {**head, "predictor_hidden_size": config.predictor_hidden_size, "objective": config.objective},
        ),
        "mtp": LayerEntry(MTPObjective, {**head, "horizon": horizon, "decoder_layer": decoder_layer}),
    }
    return [*entries, objectives[config.objective.name]]


class LayerStack(nn.Module):
    """The list as one module: rows [b, s + 1, 4] -> term sums [terms]."""

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

    def run(self, rows: torch.Tensor, stop: int | None = None) -> Any:
        """The output of the list's first `stop` entries (None: all; -1: all but the objective)."""
        value: Any = rows
        for index, forward_fn in self._calls[:stop]:
            layer = self.layers[index]
            value = layer(value) if forward_fn is None else forward_fn(layer, value)
        return value

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        sums: torch.Tensor = self.run(rows)
        return sums


def initialize(module: nn.Module, config: RunConfig, dims: ParallelDims) -> None:
    """Draw the weights of every layer that `module` holds; see `model.initialize`."""
    initialize_parameters(
        module,
        seed=config.training.seed,
        std=config.model.init_method_std,
        num_layers=config.model.num_layers,
        tensor_rank=dims.tensor_rank,
        tensor_size=dims.tensor_size,
    )
