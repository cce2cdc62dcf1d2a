"""A lean Llama forward over a preallocated key/value cache, the base model of the decoder.

One path serves prefill, the plain one-token step and verification: a block of n new tokens per row is appended to the
cache and every one of them attends to all slots up to its own. A slot is a position, so a row's length is all there is
to know about it, and taking rejected tokens back is shrinking `lengths`: slots at or beyond the length never count.
Equals `transformers.LlamaForCausalLM` to rounding (tests/inference/test_llama.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from nextlat_dist.errors import UserError
from nextlat_dist.inference.linear import linear

PREFILL_CHUNK_TOKENS = 512  # bounds the memory of the attention mask of a long prompt


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of `config.json` that the forward needs, named as there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @staticmethod
    def from_directory(directory: Path) -> LlamaConfig:
        """Raises UserError: the model is no plain Llama, and which field says so."""
        raw: dict[str, Any] = json.loads((directory / "config.json").read_text())
        rope = raw.get("rope_parameters") or {**raw, **(raw.get("rope_scaling") or {})}  # the older form is flat
        plain = {
            "model_type": (raw.get("model_type"), "llama"),
            "hidden_act": (raw.get("hidden_act"), "silu"),
            "attention_bias": (raw.get("attention_bias", False), False),
            "mlp_bias": (raw.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", "default"), "default"),
        }
        for field, (value, expected) in plain.items():
            if value != expected:
                raise UserError(
                    f"{directory / 'config.json'} has {field} {value!r}, but this decoder runs {expected!r} only"
                )
        heads = raw["num_attention_heads"]
        return LlamaConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", 10000.0),
            max_position_embeddings=raw["max_position_embeddings"],
        )


class KeyValueCache:
    """Keys and values of every layer, [batch, kv_heads, capacity, head_dim] each, and the slots in use per row."""

    def __init__(self, config: LlamaConfig, batch: int, capacity: int, like: torch.Tensor) -> None:
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a short row reads its unused slots under the mask, and 0 * NaN would be NaN.
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.lengths = [0] * batch


@dataclass(frozen=True)
class _Block:
    """Where a block of new tokens goes and what it sees; the same for every layer."""

    rotation: torch.Tensor  # [batch or 1, n, 1, head_dim / 2] complex
    mask: torch.Tensor | None  # [batch or 1, 1, group * n, end], added to the scores
    start: int  # first slot of the block, if all rows agree on it
    end: int  # slots that any row can see
    slots: torch.Tensor | None  # [batch, n], if the rows disagree


class _Layer:
    """One decoder layer; q/k rows are reordered so that the two halves that RoPE rotates together are neighbours."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], index: int) -> None:
        prefix = f"model.layers.{index}."
        q, k, v = (weights[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv")
        pairs = torch.arange(config.head_dim).view(2, -1).t().reshape(-1)
        q, k = (w.view(-1, config.head_dim, config.hidden_size)[:, pairs].reshape(w.shape) for w in (q, k))
        self.config = config
        self.input_norm = weights[f"{prefix}input_layernorm.weight"]
        self.post_attention_norm = weights[f"{prefix}post_attention_layernorm.weight"]
        self.qkv = linear(torch.cat([q, k, v]))
        self.output = linear(weights[f"{prefix}self_attn.o_proj.weight"])
        gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        self.intermediate_size = gate.shape[0]
        self.gate_up = linear(torch.cat([gate, up]))
        self.down = linear(down)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: _Block) -> torch.Tensor:
        """x [batch * n, hidden] → the same shape; writes the block's keys and values into the cache first."""
        x = x + self.output(self._attend(self._norm(x, self.input_norm), keys, values, block))
        gate_up = self.gate_up(self._norm(x, self.post_attention_norm))
        gate, up = gate_up[:, : self.intermediate_size], gate_up[:, self.intermediate_size :]
        return x + self.down(functional.silu(gate).mul_(up))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attend(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: _Block) -> torch.Tensor:
        c = self.config
        batch, groups = keys.shape[0], c.num_key_value_heads
        rotated_heads = c.num_attention_heads + groups
        qkv = self.qkv(x).view(batch, -1, rotated_heads + groups, c.head_dim)
        n = qkv.shape[1]
        rotated = _rotate(qkv[:, :, :rotated_heads], block.rotation)
        k, v = rotated[:, :, c.num_attention_heads :], qkv[:, :, rotated_heads:]
        if block.slots is None:
            keys[:, :, block.start : block.end] = k.transpose(1, 2)
            values[:, :, block.start : block.end] = v.transpose(1, 2)
        else:
            rows = torch.arange(batch, device=keys.device)[:, None]
            keys[rows, :, block.slots] = k
            values[rows, :, block.slots] = v
        # The query heads that share a key/value head become further queries of it: no copy of the cache is needed.
        q = rotated[:, :, : c.num_attention_heads].view(batch, n, groups, -1, c.head_dim).permute(0, 2, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            q.reshape(batch, groups, -1, c.head_dim),
            keys[:, :, : block.end],
            values[:, :, : block.end],
            attn_mask=block.mask,
        )
        return attended.view(batch, groups, -1, n, c.head_dim).permute(0, 3, 1, 2, 4).reshape(batch * n, -1)


class Llama:
    """The base model: `forward` gives the final-normed hidden states h, `logits` is the output head that reads them."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> None:
        """`weights` are the export's base tensors; they are cast to `dtype` and moved to `device`."""
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
        self.config = config
        self.embedding = weights["model.embed_tokens.weight"]
        self.layers = [_Layer(config, weights, index) for index in range(config.num_hidden_layers)]
        self.final_norm = weights["model.norm.weight"]
        self._head = linear(weights.get("lm_head.weight", self.embedding))
        self._rotations = _rotations(config, device, dtype)

    def new_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for `batch` rows of up to `capacity` tokens (at most `max_position_embeddings`)."""
        assert capacity <= self.config.max_position_embeddings, capacity
        return KeyValueCache(self.config, batch, capacity, self.embedding)

    def forward(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Append `tokens [batch, n]` at each row's length; returns h [batch, n, hidden] and advances the lengths."""
        batch, n = tokens.shape
        block = self._block(cache, n)
        x = functional.embedding(tokens, self.embedding).view(batch * n, -1)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.forward(x, keys, values, block)
        cache.lengths = [length + n for length in cache.lengths]
        h = functional.rms_norm(x, self.final_norm.shape, self.final_norm, self.config.rms_norm_eps)
        return h.view(batch, n, -1)

    def prefill(self, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """`forward` over `tokens [batch, n]` in chunks; returns the last h only, [batch, hidden]."""
        for chunk in tokens.split(PREFILL_CHUNK_TOKENS, dim=1):
            h = self.forward(chunk, cache)[:, -1]
        return h

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """h [rows, hidden] → logits [rows, vocab]."""
        return self._head(h)

    def _block(self, cache: KeyValueCache, n: int) -> _Block:
        lengths, group = cache.lengths, self.config.num_attention_heads // self.config.num_key_value_heads
        start, end = lengths[0], max(lengths) + n
        assert end <= cache.keys[0].shape[2], "the cache is full"
        if min(lengths) == max(lengths):
            rotation = self._rotations[start:end][None, :, None]
            if n == 1:  # a single new token sees every slot up to its own
                return _Block(rotation, None, start, end, None)
            visible = torch.ones(n, end, dtype=torch.bool, device=self.embedding.device).tril_(start)
            return _Block(rotation, self._mask(visible[None], group), start, end, None)
        device = self.embedding.device
        slots = torch.tensor(lengths, device=device)[:, None] + torch.arange(n, device=device)
        visible = torch.arange(end, device=device) <= slots[:, :, None]
        return _Block(self._rotations[slots][:, :, None], self._mask(visible, group), start, end, slots)

    def _mask(self, visible: torch.Tensor, group: int) -> torch.Tensor:
        """visible [batch, n, end] → what is added to the scores, [batch, 1, group * n, end]."""
        mask = self.embedding.new_zeros(visible.shape).masked_fill_(visible.logical_not_(), -torch.inf)
        return mask.repeat(1, group, 1)[:, None]


def _rotations(config: LlamaConfig, device: str, dtype: torch.dtype) -> torch.Tensor:
    """e^(i · position · frequency), [max_position_embeddings, head_dim / 2] complex.

    Angles, cosines and sines are taken in fp32 for every dtype, as transformers does: the trained model saw these.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), 1.0 / (config.rope_theta**exponents))
    cosine, sine = (table.to(dtype) for table in (angles.cos(), angles.sin()))
    wide = torch.promote_types(dtype, torch.float32)  # there is no complex bf16
    return torch.complex(cosine.to(wide), sine.to(wide)).to(device)


def _rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """RoPE on neighbouring pairs as one complex product: x [batch, n, heads, head_dim]."""
    pairs = x.unflatten(-1, (-1, 2)).to(rotation.real.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2).to(x.dtype)
