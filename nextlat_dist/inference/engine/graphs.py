"""Decoding in static shapes, so that CUDA graphs can hold it: a launch per step instead of hundreds of kernels.

`Graphs.run` calls a function of tensors; on a GPU it captures the call the first time that it sees a key and replays
it from then on. `StaticLlama` gives the forward a shape that depends on few numbers (rows, tokens per row and visible
slots, each rounded up), with everything else in tensors. Draft steps and whole draft loops go through `Graphs.run` too.

Invariant: results are those of `Llama`, to rounding; padding rows and padding tokens are computed and thrown away. The
same functions run uncaptured on a CPU (`Graphs(capture=False)`), where tests compare them.

Memory is bounded: of caches that no batch uses, and of captured graphs, those that were used last are kept, and graphs
share one pool of memory for their intermediate results.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from nextlat_dist.inference.engine.llama import Block, KeyValueCache, Llama

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 17)  # tokens per row; wider blocks are prefills and run uncaptured
SLOTS = 256  # visible slots are rounded up to a multiple
WARM_UP_CALLS = 2
MOST_IDLE_CACHES = 4  # a cache is as large as the batch that it was made for
MOST_GRAPHS = 128  # of one `Graphs`: every exact temperature, width, number of rows and of visible slots has its own

Tensors = tuple[torch.Tensor, ...]


@dataclass
class _Captured:
    graph: Any  # torch.cuda.CUDAGraph
    inputs: Tensors
    outputs: Tensors


class Graphs:
    """Calls of functions, captured by key.

    A function gets tensors whose first dimension is the rows, does the same for every call with its key, and returns
    tensors whose first dimension is the rows. What it returns is overwritten by the next call with the same key.
    """

    def __init__(self, capture: bool) -> None:
        self.capture = capture
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()  # that used last comes last
        self._pool: Any = None

    def run(self, key: Hashable, function: Callable[..., Tensors], *inputs: torch.Tensor) -> Tensors:
        """`function(*inputs)`; rows are padded with zeros to a power of two, and cut off again."""
        rows = inputs[0].shape[0]
        padded = power_of_two(rows)
        if padded != rows:
            inputs = tuple(functional.pad(x, (0, 0) * (x.dim() - 1) + (0, padded - rows)) for x in inputs)
        outputs = self._replay((key, padded), function, inputs) if self.capture else function(*inputs)
        return outputs if padded == rows else tuple(output[:rows] for output in outputs)

    def _replay(self, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        captured = self._captured.pop(key, None)
        if captured is None:
            while len(self._captured) >= MOST_GRAPHS:
                self._captured.popitem(last=False)
            if self._pool is None:
                self._pool = new_pool()
            captured = capture(function, inputs, self._pool)
        self._captured[key] = captured
        for held, given in zip(captured.inputs, inputs, strict=True):
            held.copy_(given)
        captured.graph.replay()
        return captured.outputs


def new_pool() -> Any:
    """Memory that graphs share. They run one after the other, and nothing but what they return outlives a replay: those
    tensors are held, so that no other graph is given their memory.
    """
    return torch.cuda.graph_pool_handle()


def capture(function: Callable[..., Tensors], inputs: Tensors, pool: Any) -> _Captured:
    held = tuple(x.clone() for x in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces in these calls
        for _ in range(WARM_UP_CALLS):
            function(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = function(*held)
    return _Captured(graph, held, outputs)


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()


class StaticCache(KeyValueCache):
    """A cache that outlives a batch, with the graphs that hold its addresses."""

    graphs: Graphs
    busy: bool = False

    @property
    def rows(self) -> int:
        return self.keys[0].shape[0]

    def release(self) -> None:
        self.busy = False


class StaticLlama(Llama):
    """`Llama` with short blocks in static shapes. A few caches are kept and used again, with their graphs."""

    def __init__(self, *arguments: Any, capture: bool) -> None:
        """`arguments` as for `Llama`; without `capture` the same shapes run as they are."""
        super().__init__(*arguments)
        self.capture = capture
        self._caches: list[StaticCache] = []  # that used last comes last

    def new_cache(self, rows: int, capacity: int, layers: int | None = None) -> KeyValueCache:
        if layers is not None:
            return super().new_cache(rows, capacity, layers)
        # Padding tokens need slots of their own after the last real one.
        size, slots = power_of_two(rows), _round_up(capacity + WIDTHS[-1], SLOTS)
        idle = [cache for cache in self._caches if not cache.busy]
        fitting = [cache for cache in idle if cache.rows >= size and cache.capacity >= slots]
        if fitting:
            cache = min(fitting, key=lambda cache: cache.rows * cache.capacity)
            self._caches.remove(cache)
        else:
            for oldest in idle[: max(0, len(idle) + 1 - MOST_IDLE_CACHES)]:
                self._caches.remove(oldest)
            cache = StaticCache(self.config, size, slots, self.embedding, len(self.layers))
            cache.graphs = Graphs(self.capture)
        self._caches.append(cache)
        cache.busy = True
        cache.lengths = [0] * rows
        return cache

    def forward(self, tokens: torch.Tensor, counts: Sequence[int], cache: KeyValueCache) -> torch.Tensor:
        rows, width = len(counts), next((w for w in WIDTHS if w >= max(counts)), None)
        if width is None or not isinstance(cache, StaticCache):
            return super().forward(tokens, counts, cache)
        end = min(_round_up(max(cache.lengths) + width, SLOTS), cache.capacity)
        index = None
        if min(counts) < width:
            places = [row * width + i for row, count in enumerate(counts) for i in range(count)]
            index = torch.tensor(places, device=self.device)
            tokens = tokens.new_zeros(rows * width).index_copy_(0, index, tokens)
        lengths = torch.tensor(cache.lengths, device=self.device)

        def step(tokens: torch.Tensor, lengths: torch.Tensor) -> Tensors:
            return (self.run(tokens.view(-1), self.static_block(lengths, width, end), cache).view(*tokens.shape, -1),)

        (h,) = cache.graphs.run((width, end), step, tokens.view(rows, width), lengths)
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        h = h.reshape(rows * width, -1)
        return h if index is None else h[index]

    def static_block(self, lengths: torch.Tensor, width: int, end: int) -> Block:
        """The block that appends `width` tokens to every row, at lengths [rows] that only the device knows."""
        rows = lengths.shape[0]
        slots = lengths[:, None] + torch.arange(width, device=self.device)
        visible = torch.arange(end, device=self.device) <= slots[:, :, None]
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        flat = slots.view(-1)
        row = torch.arange(rows, device=self.device).repeat_interleave(width, output_size=rows * width)
        # Padding tokens may lie beyond the last position there is.
        rotation = self.rotations[flat.clamp(max=self.config.max_position_embeddings - 1)][:, None]
        return Block(rows, width, rotation, self.mask(visible, group), 0, end, (row, flat), None)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
