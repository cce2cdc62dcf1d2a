"""Drafts from multi-token prediction: extra layers on top of the base, each for a token further ahead.

At the last verified position t, `head(norm_i(layer_i(h_1 .. h_t)))` proposes x_{t+1+i}, i = 1 .. d: from the past
alone, whatever was drafted before it. A layer attends to all earlier positions, so it has a key/value cache of its own.
It reads the states that were settled since it last ran just before it proposes, and a prompt at once: a row that drafts
nothing pays for storing states only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.nn import functional

from nextlat_dist.huggingface.drafters.format import StoredDrafter
from nextlat_dist.huggingface.drafters.mtp import MTPConfig
from nextlat_dist.inference.drafting import Chooser, DraftMemory, Drawn, unroll
from nextlat_dist.inference.engine.graphs import Graphs
from nextlat_dist.inference.engine.llama import PREFILL_CHUNK_TOKENS, Llama, LlamaLayer


def build(stored: StoredDrafter, llama: Llama, graphs: Graphs | None) -> MultiTokenPrediction:
    """The drafter of an export's `mtp/`; its steps are not captured in graphs."""
    return MultiTokenPrediction(stored.config, stored.weights, llama)


class MultiTokenPrediction:
    """The extra layers of an export, with the base model's own output head."""

    vocabulary: torch.Tensor | None = None

    def __init__(self, config: MTPConfig, weights: dict[str, torch.Tensor], llama: Llama) -> None:
        """`weights` as in `huggingface.drafters.mtp`; cast and moved to where `llama` is."""
        weights = {name: tensor.to(llama.embedding) for name, tensor in weights.items()}
        self.llama = llama
        self.longest: int | None = config.horizon
        self.layers = [LlamaLayer(llama.config, weights, f"layers.{index}.") for index in range(config.horizon)]
        self.norms = [weights[f"layers.{index}.norm.weight"] for index in range(config.horizon)]

    def start(self, rows: int, capacity: int) -> DraftMemory:
        return _Past(self, rows, capacity)


class _Past:
    """The settled states of a batch's rows, and the keys and values of those that each layer has read."""

    def __init__(self, mtp: MultiTokenPrediction, rows: int, capacity: int) -> None:
        llama = mtp.llama
        self.mtp = mtp
        self.states = llama.embedding.new_zeros(rows, capacity, llama.config.hidden_size)
        self.lengths = [0] * rows
        self.caches = [llama.new_cache(rows, capacity, layers=1) for _ in mtp.layers]
        self.outputs = [llama.embedding.new_zeros(rows, llama.config.hidden_size) for _ in mtp.layers]
        self.rows: list[int] = []  # of the cycle under way
        self.step = 0

    def observe(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        self._shrink(len(counts))  # the batch does not say when its last row has ended
        start = 0
        for row, (count, kept) in enumerate(zip(counts, settled, strict=True)):
            first = self.lengths[row]
            self.states[row, first : first + kept] = states[start : start + kept]
            self.lengths[row] += kept
            start += count
        if max(counts) > len(self.caches) + 1:  # more than a cycle can bring: a prompt, whose time is the prefill's
            for layer in range(len(self.caches)):
                self._read(layer, range(len(counts)))

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        self.rows = list(range(len(h)) if rows is None else rows)
        self.step = 0

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        if kept is not None:
            self.rows = [self.rows[index] for index in kept.tolist()]
        layer, llama = self.step, self.mtp.llama
        self.step += 1
        self._read(layer, self.rows)
        output, norm = self.outputs[layer][self.rows], self.mtp.norms[layer]
        return llama.logits(functional.rms_norm(output, norm.shape, norm, llama.config.rms_norm_eps))

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        return unroll(self, chooser, h, tokens, uniforms, confidences)

    def move(self, source: int, target: int) -> None:
        used = self.lengths[target] = self.lengths[source]
        self.states[target, :used] = self.states[source, :used]
        for cache, output in zip(self.caches, self.outputs, strict=True):
            cache.move(source, target)
            output[target] = output[source]
        self._shrink(source)

    def _shrink(self, rows: int) -> None:
        self.lengths = self.lengths[:rows]
        for cache in self.caches:
            cache.shrink(rows)

    def _read(self, layer: int, rows: Sequence[int]) -> None:
        """Let a layer read what was settled in these rows since it last did; `outputs` are those at their last
        positions.
        """
        cache, going = self.caches[layer], set(rows)
        width = max(1, PREFILL_CHUNK_TOKENS // len(rows))
        while True:
            new = [min(width, own - read) for own, read in zip(self.lengths, cache.lengths, strict=True)]
            counts = [count if row in going else 0 for row, count in enumerate(new)]
            if not any(counts):
                return
            states = [self.states[row, (at := cache.lengths[row]) : at + count] for row, count in enumerate(counts)]
            block = self.mtp.llama.block(cache, counts)
            x = self.mtp.layers[layer].forward(torch.cat(states), cache.keys[0], cache.values[0], block)
            cache.lengths = [read + count for read, count in zip(cache.lengths, counts, strict=True)]
            read_now = [row for row, count in enumerate(counts) if count]
            ends = [end - 1 for end, count in zip(accumulate(counts), counts, strict=True) if count]
            self.outputs[layer][read_now] = x[ends]
