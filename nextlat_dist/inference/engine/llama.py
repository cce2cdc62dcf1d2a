"""A lean Llama forward over a preallocated key/value cache, the base model of the decoder.

One path serves prefill, the plain one-token step and verification: a block of new tokens, as many per row as the row
needs, is appended to the cache, and every one of them attends to all slots up to its own. Rows are of any length and
nothing is padded but the queries of attention. A slot is a position, so a row's length is all there is to know about
it, and taking rejected tokens back is shrinking `lengths`: slots at or beyond the length never count.
Equals `transformers.LlamaForCausalLM` to rounding (tests/inference/engine/test_llama.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.inference.engine.linear import linear, output_head

PREFILL_CHUNK_TOKENS = 2048  # of all rows together; bounds the memory of attention masks and activations


class KeyValueCache:
    """Keys and values of every layer, [rows, kv_heads, capacity, head_dim] each, and the slots in use per row.

    The first `len(lengths)` rows are in use; a row that has ended is replaced by the last one (`move`).
    """

    def __init__(self, config: LlamaConfig, rows: int, capacity: int, like: torch.Tensor, layers: int) -> None:
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        # Zeros, not empty: a short row reads its unused slots under the mask, and 0 * NaN would be NaN.
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.lengths = [0] * rows

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    def move(self, source: int, target: int) -> None:
        """Row `source` replaces row `target`."""
        used = self.lengths[source]
        for stored in (*self.keys, *self.values):
            stored[target, :, :used] = stored[source, :, :used]
        self.lengths[target] = used

    def shrink(self, rows: int) -> None:
        """Keep the first `rows` rows."""
        self.lengths = self.lengths[:rows]

    def release(self) -> None:
        """The batch is done with it."""


@dataclass(frozen=True)
class Block:
    """Where new tokens go and what they see; the same for every layer. They are flat: all of row 0, then row 1, …"""

    rows: int
    width: int  # most new tokens of a row
    rotation: torch.Tensor  # [tokens, 1, head_dim / 2] complex
    mask: torch.Tensor | None  # [rows or 1, 1, group * width, end], added to the scores
    start: int  # first slot of the block, if all rows agree on it
    end: int  # slots that any row can see
    places: tuple[torch.Tensor, torch.Tensor] | None  # row and slot of every token, if the rows' slots disagree
    padded: torch.Tensor | None  # index of every token in [rows * width], if the rows' numbers of tokens disagree


class LlamaLayer:
    """One decoder layer; q/k rows are reordered so that the two halves that RoPE rotates together are neighbours."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], prefix: str) -> None:
        """`weights[prefix + "self_attn.q_proj.weight"]` and so on, as `LlamaForCausalLM` names them."""
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

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: Block) -> torch.Tensor:
        """x [tokens, hidden] → the same shape; writes the block's keys and values into the cache first."""
        x = x + self.output(self._attend(self._norm(x, self.input_norm), keys, values, block))
        gate_up = self.gate_up(self._norm(x, self.post_attention_norm))
        gate, up = gate_up[:, : self.intermediate_size], gate_up[:, self.intermediate_size :]
        return x + self.down(functional.silu(gate).mul_(up))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

    def _attend(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, block: Block) -> torch.Tensor:
        c, rows, width = self.config, block.rows, block.width
        groups = c.num_key_value_heads
        rotated_heads = c.num_attention_heads + groups
        qkv = self.qkv(x).view(-1, rotated_heads + groups, c.head_dim)
        rotated = _rotate(qkv[:, :rotated_heads], block.rotation)
        k, v = rotated[:, c.num_attention_heads :], qkv[:, rotated_heads:]
        if block.places is None:
            place = slice(block.start, block.end)
            keys[:rows, :, place] = k.view(rows, width, groups, -1).transpose(1, 2)
            values[:rows, :, place] = v.view(rows, width, groups, -1).transpose(1, 2)
        else:
            row, slot = block.places
            keys[row, :, slot] = k
            values[row, :, slot] = v
        q = rotated[:, : c.num_attention_heads]
        if block.padded is not None:
            q = q.new_zeros(rows * width, *q.shape[1:]).index_copy_(0, block.padded, q)
        # The query heads that share a key/value head become further queries of it: no copy of the cache is needed.
        q = q.view(rows, width, groups, -1, c.head_dim).permute(0, 2, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            q.reshape(rows, groups, -1, c.head_dim),
            keys[:rows, :, : block.end],
            values[:rows, :, : block.end],
            attn_mask=block.mask,
        )
        attended = attended.view(rows, groups, -1, width, c.head_dim).permute(0, 3, 1, 2, 4).reshape(rows * width, -1)
        return attended if block.padded is None else attended[block.padded]


class Llama:
    """The base model: `forward` gives the final-normed hidden states h, `logits` is the output head that reads them."""

    def __init__(self, config: LlamaConfig, weights: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> None:
        """`weights` are the export's base tensors; they are cast to `dtype` and moved to `device`."""
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
        self.config = config
        self.embedding = weights["model.embed_tokens.weight"]
        self.layers = [
            LlamaLayer(config, weights, f"model.layers.{index}.") for index in range(config.num_hidden_layers)
        ]
        self.final_norm = weights["model.norm.weight"]
        self.head_weight = weights.get("lm_head.weight", self.embedding)
        self._head = output_head(self.head_weight)
        self.rotations = _rotations(config, device, dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def state_size(self) -> int:
        """Numbers of a state; its first `hidden_size` are h, what the output head reads."""
        return self.config.hidden_size

    @property
    def half_precision(self) -> bool:
        return self.embedding.dtype in (torch.bfloat16, torch.float16)

    def new_cache(self, rows: int, capacity: int, layers: int | None = None) -> KeyValueCache:
        """An empty cache for `rows` rows of up to `capacity` tokens (at most `max_position_embeddings`)."""
        assert capacity <= self.config.max_position_embeddings, capacity
        return KeyValueCache(self.config, rows, capacity, self.embedding, layers or len(self.layers))

    def forward(self, tokens: torch.Tensor, counts: Sequence[int], cache: KeyValueCache) -> torch.Tensor:
        """Append `counts[r]` tokens to row r, at its length; advances the lengths.

        Args:
            tokens: [sum(counts)], all of row 0, then all of row 1, ….
            counts: one number per row in use, 0 allowed.

        Returns:
            h [sum(counts), hidden].
        """
        h = self.run(tokens, self.block(cache, counts), cache)
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        return h

    def run(self, tokens: torch.Tensor, block: Block, cache: KeyValueCache) -> torch.Tensor:
        """tokens [rows * width or fewer], placed as `block` says → h, as many; the cache's lengths stay."""
        return self.normed(self.trunk(tokens, block, cache))

    def trunk(self, tokens: torch.Tensor, block: Block, cache: KeyValueCache) -> torch.Tensor:
        """The same before the final norm."""
        x = functional.embedding(tokens, self.embedding)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer.forward(x, keys, values, block)
        return x

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm."""
        return functional.rms_norm(x, self.final_norm.shape, self.final_norm, self.config.rms_norm_eps)

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: KeyValueCache
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """`forward` over whole prompts, one per row, in chunks: (h [sum(counts), hidden], counts) of each chunk."""
        width = max(1, PREFILL_CHUNK_TOKENS // len(prompts))
        for start in range(0, max(map(len, prompts)), width):
            parts = [prompt[start : start + width] for prompt in prompts]
            counts = [len(part) for part in parts]
            flat = torch.tensor([token for part in parts for token in part], device=self.device)
            yield self.forward(flat, counts, cache), counts

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """States [rows, state] → logits of the next token [rows, vocab], in fp32 at least."""
        return self.head(h)

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """What the output head reads [rows, hidden] → logits [rows, vocab], in fp32 at least."""
        return self._head(h)

    def block(self, cache: KeyValueCache, counts: Sequence[int]) -> Block:
        """The block that appends `counts[r]` tokens to row r of `cache`."""
        lengths, width, rows = cache.lengths, max(counts), len(counts)
        start, end = lengths[0], max(length + count for length, count in zip(lengths, counts, strict=True))
        assert end <= cache.capacity, "the cache is full"
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        even = min(counts) == width
        if even and min(lengths) == max(lengths):
            rotation = self.rotations[start:end][:, None]
            rotation = rotation if rows == 1 else rotation.repeat(rows, 1, 1)
            if width == 1:  # a single new token sees every slot up to its own
                return Block(rows, 1, rotation, None, start, end, None, None)
            visible = torch.ones(width, end, dtype=torch.bool, device=self.device).tril_(start)
            return Block(rows, width, rotation, self.mask(visible[None], group), start, end, None, None)
        slots = torch.tensor(lengths, device=self.device)[:, None] + torch.arange(width, device=self.device)
        visible = torch.arange(end, device=self.device) <= slots[:, :, None]
        mask = self.mask(visible, group)
        if even:
            row = torch.arange(rows, device=self.device).repeat_interleave(width)
            flat, padded = slots.view(-1), None
        else:
            places = [(r, r * width + i, lengths[r] + i) for r, count in enumerate(counts) for i in range(count)]
            row, padded, flat = torch.tensor(places, device=self.device).t().unbind()
        return Block(rows, width, self.rotations[flat][:, None], mask, start, end, (row, flat), padded)

    def mask(self, visible: torch.Tensor, group: int) -> torch.Tensor:
        """visible [rows, width, end] → what is added to the scores, [rows, 1, group * width, end]."""
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
    """RoPE on neighbouring pairs as one complex product: x [tokens, heads, head_dim]."""
    pairs = x.unflatten(-1, (-1, 2)).to(rotation.real.dtype)
    return torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2).to(x.dtype)
