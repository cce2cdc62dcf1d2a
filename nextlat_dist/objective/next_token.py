"""The baseline objective: next-token prediction alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nextlat_dist.model.embedding import LABEL
from nextlat_dist.objective.masks import masked_sum, next_token_mask
from nextlat_dist.objective.output_head import OutputHead


class NextTokenObjective(nn.Module):
    """(hidden [s, b, h], rows[, tied weight]) -> term sums [1]."""

    canonical_prefix = ""

    def __init__(
        self, transformer_config: Any, vocab_size: int, padded_vocab_size: int, process_groups: Any, tied: bool
    ) -> None:
        super().__init__()
        self.output_layer = OutputHead(transformer_config, vocab_size, padded_vocab_size, process_groups, tied)

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        hidden, rows, *lent = inputs
        targets = rows[:, 1:, LABEL].t()
        cross_entropy, _ = self.output_layer(hidden, targets, [], *lent)
        return masked_sum(cross_entropy, next_token_mask(rows))[None]
