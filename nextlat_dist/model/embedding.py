"""The token embedding and its three uses in the layer list: first layer, input of an objective, tied output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nextlat_dist.model.decoder_layer import scatter_sequence
from nextlat_dist.model.rows import Batch, ObjectiveInputs


class TokenEmbedding(nn.Module):
    """Vocabulary-parallel embedding e(x); the latent predictor reads the same weight, so gradients flow from both."""

    canonical_prefix = "embedding"

    def __init__(
        self,
        transformer_config: Any,
        padded_vocab_size: int,
        process_groups: Any,
        scattered_over: Any = None,
        deterministic: bool = False,
    ) -> None:
        """
        Args:
            scattered_over: the ranks that have a part of the sequence each in the layers that follow.
            deterministic: the gradient is added up in an order that the tokens decide, by indexing: torch has no such
                kernel for the backward pass of its embedding on a GPU.
        """
        super().__init__()
        from megatron.core.tensor_parallel import VocabParallelEmbedding

        self.scattered_over = scattered_over
        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size,
            transformer_config.hidden_size,
            init_method=transformer_config.init_method,
            config=transformer_config,
            tp_group=process_groups.tp,
        )
        self.word_embeddings.deterministic_mode = deterministic

    def forward(self, message: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """message of a batch -> (e(x) of its s input tokens [s (local), b, h], message): the list's first entry.

        A plain forward, because DeepSpeed leaves tied layers that are called through a function out of its checkpoints.
        """
        return scatter_sequence(self.whole(message), self.scattered_over), message

    def whole(self, message: torch.Tensor) -> torch.Tensor:
        """e(x) [s, b, h]."""
        embedded: torch.Tensor = self.word_embeddings(Batch(message).inputs)
        return embedded.transpose(0, 1).contiguous()


def embed_for_objective(embedding: TokenEmbedding, inputs: ObjectiveInputs) -> ObjectiveInputs:
    """Entry before the objective: adds e(x) [s, b, h]; a tied layer in a pipeline."""
    return inputs._replace(embedded=embedding.whole(inputs.message))


def embed_apart(embedding: TokenEmbedding, inputs: ObjectiveInputs) -> ObjectiveInputs:
    """The same without a gradient (`objective.detach_base`)."""
    return inputs._replace(embedded=embedding.whole(inputs.message).detach())


def tie_output_head(embedding: TokenEmbedding, inputs: ObjectiveInputs) -> ObjectiveInputs:
    """Entry before the objective when the output head is tied: adds the embedding's weight [vocab (local), h]."""
    return inputs._replace(tied_weight=embedding.word_embeddings.weight)
