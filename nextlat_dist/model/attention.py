"""Core attention inside documents: torch SDPA under Megatron-Core's attention interface.

Every document is attended to by itself: the cost follows the sum of squared lengths, and no tensor has a row's length
squared. On a CPU, documents of one length go together; on an accelerator, varlen flash attention takes rows laid end to
end. `document_attention_mask` says the same as a dense mask: the test oracle, and the way of precisions that flash
attention does not have.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nextlat_dist.model.rotary import Rotation
from nextlat_dist.model.rows import Batch, first_of_document


def document_attention_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """document_ids [b, s] -> bool [b, 1, s, s], True where position i may attend to j: j <= i in the same document.

    Padding (-1) attends to padding only, so that no softmax is empty.
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()[:, None]


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie.

    Attributes:
        order: of all tokens that are no padding, documents of one length one after the other: indices into [s * b].
        groups: (documents, their length), in that order.
    """

    order: torch.Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, document_ids: torch.Tensor) -> Documents:
        """From [b, s] on a CPU."""
        rows, length = document_ids.shape
        starts = first_of_document(document_ids).flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([rows * length]))
        real = document_ids.flatten()[starts] >= 0
        starts, lengths = starts[real], lengths[real]
        order, groups = [], []
        for size in lengths.unique().tolist():
            chosen = starts[lengths == size]
            order.append((chosen[:, None] + torch.arange(size)).flatten())
            groups.append((len(chosen), size))
        places = torch.cat(order) if order else starts
        return cls((places % length) * rows + places // length, tuple(groups))


@dataclass(frozen=True)
class Ends:
    """Where the documents of rows laid end to end begin and end, on an accelerator.

    Attributes:
        bounds: int32 [documents + 1]: document k is bounds[k] .. bounds[k + 1] of [b * s]; padding is one, and empty
            ones make up the number.
        longest: no document is longer: s.
        document_ids: [b, s].
    """

    bounds: torch.Tensor
    longest: int
    document_ids: torch.Tensor

    @classmethod
    def of(cls, document_ids: torch.Tensor, documents: int | None) -> Ends:
        """From [b, s], without a word from the device: `documents` is at least how many there are, or None."""
        rows, length = document_ids.shape
        number = first_of_document(document_ids).flatten().cumsum(0) - 1
        most = rows * length if documents is None else documents
        bounds = torch.searchsorted(number, torch.arange(most + 1, device=number.device)).int()
        return cls(bounds, length, document_ids)


Visible = Documents | Ends


def visible(message: torch.Tensor, documents: int | None = None) -> Visible:
    """What `DocumentAttention` must know of the batch of a message, found once for all layers that see this message.

    `documents`: at least as many as the batch has, padding at the ends of rows included; None: as many as may be.
    """
    known: Visible | None = getattr(message, "_visible", None)
    if known is None:
        ids = Batch(message).input_documents
        known = Documents.of(ids) if message.device.type == "cpu" else Ends.of(ids, documents)
        message._visible = known  # type: ignore[attr-defined]
    return known


class Seen(NamedTuple):
    """What a layer gives its attention with q, k and v."""

    visible: Visible
    rotation: Rotation


def flash_takes(query: torch.Tensor) -> bool:
    """Whether varlen flash attention has this precision and head size; on meta tensors as on a GPU."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention inside documents laid end to end: [tokens, heads, head size] each -> the same.

    Its signature is torch's own affair: 2.11 has `is_causal`, no scale and no grouped queries, 2.13 a window.
    """
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    if "scale" in takes:
        how["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)  # the kernel divides by the root of the head size
    groups = key.shape[1]
    if groups != query.shape[1] and "enable_gqa" in takes:
        how["enable_gqa"] = True
    elif groups != query.shape[1]:
        key, value = (part.repeat_interleave(query.shape[1] // groups, dim=1) for part in (key, value))
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **how)
    assert isinstance(output, torch.Tensor)  # a pair only where more was asked for
    return output


class DocumentAttention(nn.Module):
    """Megatron-Core calls it instead of its own core attention; q, k, v are [s, b, heads (local), head size]."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = config.softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Seen | Visible | torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        """-> [s, b, heads (local) * head size]; zeros on padding, or what padding sees of itself.

        `attention_mask`: the documents, and how positions are rotated, or a dense mask, True where allowed.
        """
        if isinstance(attention_mask, Seen):
            query, key = attention_mask.rotation(query), attention_mask.rotation(key)
            attention_mask = attention_mask.visible
        if isinstance(attention_mask, Documents):
            return self._in_groups(query, key, value, attention_mask)
        if isinstance(attention_mask, Ends) and flash_takes(query):
            return self._end_to_end(query, key, value, attention_mask)
        if isinstance(attention_mask, Ends):
            attention_mask = document_attention_mask(attention_mask.document_ids)
        s, b, heads, head_size = query.shape
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = self._attend(q, k, v, attn_mask=attention_mask)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * head_size)

    def _end_to_end(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Ends) -> torch.Tensor:
        s, b, heads, head_size = query.shape
        q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        out = varlen_attention(q, k, v, documents.bounds, documents.longest, self.softmax_scale)
        return out.view(b, s, heads * head_size).transpose(0, 1)

    def _in_groups(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        s, b, heads, head_size = query.shape
        if not documents.groups:
            return query.new_zeros(s, b, heads * head_size)
        places = documents.order.split([number * length for number, length in documents.groups])
        parts = (_Take.apply(tensor.flatten(0, 1), *places) for tensor in (query, key, value))
        outputs = []
        for (number, length), *inputs in zip(documents.groups, *parts, strict=True):
            q, k, v = (tensor.view(number, length, -1, head_size).transpose(1, 2) for tensor in inputs)
            out = self._attend(q, k, v, is_causal=True)
            outputs.append(out.transpose(1, 2).reshape(number * length, heads * head_size))
        whole: torch.Tensor = _Put.apply(s * b, places, *outputs)
        return whole.view(s, b, heads * head_size)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **seen: Any) -> torch.Tensor:
        out: torch.Tensor = F.scaled_dot_product_attention(
            q, k, v, scale=self.softmax_scale, enable_gqa=k.shape[1] != q.shape[1], **seen
        )
        return out


class _Take(torch.autograd.Function):
    """Rows [count, …] -> those of each group by their places, none twice: autograd would add up what can be copied."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*places)
        ctx.count = len(rows)
        return tuple(rows.index_select(0, part) for part in places)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _put(gradients, ctx.saved_tensors, ctx.count), *(None for _ in gradients)


class _Put(torch.autograd.Function):
    """The inverse of `_Take`: (count, places of each group, its rows) -> [count, …], zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, count: int, places: tuple[torch.Tensor, ...], *rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*places)
        return _put(rows, places, count)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(gradient.index_select(0, part) for part in ctx.saved_tensors)


def _put(rows: Sequence[torch.Tensor], places: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    make = rows[0].new_empty if sum(map(len, places)) == count else rows[0].new_zeros
    whole = make(count, *rows[0].shape[1:])
    for part, of_part in zip(rows, places, strict=True):
        whole.index_copy_(0, of_part, part)
    return whole


class RecomputedAttention(DocumentAttention):
    """`DocumentAttention` that keeps its inputs and its output alone; the backward pass computes the rest again."""

    def forward(self, *inputs: Any, **named: Any) -> torch.Tensor:
        run = partial(super().forward, **named)
        if not torch.is_grad_enabled():
            return run(*inputs)
        output: torch.Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return output
