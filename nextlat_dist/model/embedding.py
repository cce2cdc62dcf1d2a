"""Token embedding, its two uses in the layer list, and what travels between layers.

Between layers travels `(hidden, rows)`: `hidden` is [s, b, h], `rows` is an integer tensor [b, s + 1, 4] that carries
token, document number (-1 on padding), loss mask and label of every position, so that every pipeline stage has what it
needs and a pipeline message holds exactly one tensor with a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TOKEN, DOCUMENT, LOSS_MASK, LABEL = 0, 1, 2, 3  # last dimension of `rows`


def pack_rows(
    tokens: torch.Tensor, document_ids: torch.Tensor, loss_mask: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """[b, s + 1] each -> rows [b, s + 1, 4] (int64); the label, what is predicted in a token's place, is the token
    itself where none are given.
    """
    labels = tokens if labels is None else labels
    return torch.stack([tokens.long(), document_ids.long(), loss_mask.long(), labels.long()], dim=-1)


class TokenEmbedding(nn.Module):
    """Vocabulary-parallel embedding e(x); the latent predictor reads the same weight, so gradients flow from both."""

    canonical_prefix = "embedding"

    def __init__(self, transformer_config: Any, padded_vocab_size: int, process_groups: Any) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import VocabParallelEmbedding

        self.word_embeddings = VocabParallelEmbedding(
            padded_vocab_size,
            transformer_config.hidden_size,
            init_method=transformer_config.init_method,
            config=transformer_config,
            tp_group=process_groups.tp,
        )

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [b, s + 1, 4] -> (e(x) of the s input tokens [s, b, h], rows): the first entry of the layer list.

        A plain forward, because DeepSpeed leaves tied layers that are called through a function out of its checkpoints.
        """
        tokens = rows[:, :-1, TOKEN]
        return self.word_embeddings(tokens).transpose(0, 1).contiguous(), rows


def embed_for_predictor(
    embedding: TokenEmbedding, inputs: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entry before the objective: (hidden, rows) -> (hidden, rows, e(x) [s, b, h]), a tied layer in a pipeline."""
    hidden, rows = inputs
    embedded, _ = embedding(rows)
    return hidden, rows, embedded


def lend_weight(embedding: TokenEmbedding, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Entry before the objective when the output head is tied: appends the embedding's weight [vocab (local), h]."""
    return (*inputs, embedding.word_embeddings.weight)
