"""Core attention with document masks: torch SDPA under Megatron-Core's attention interface, on CPU and GPU alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def document_attention_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """document_ids [b, s] -> bool [b, 1, s, s], True where position i may attend to j: j <= i in the same document.

    Padding (-1) attends to padding only, so that no softmax is empty.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


class DocumentMaskedAttention(nn.Module):
    """Megatron-Core calls it instead of its own core attention; q, k, v are [s, b, heads (local), head size]."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """-> [s, b, heads (local) * head size]; `attention_mask` is True where attention is allowed."""
        s, b, heads, head_size = query.shape
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, scale=self.softmax_scale, enable_gqa=k.shape[1] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * head_size)
