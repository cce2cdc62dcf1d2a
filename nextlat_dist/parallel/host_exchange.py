"""Objects of all ranks over the hosts' network, next to what the GPUs exchange, with few connections for each rank.

A gloo group connects every rank with every other: 1,023 sockets for each of 1,024 ranks, as many as a process may have
open by default. Here ranks form blocks of about the square root of their number: a rank is connected with its block,
and the first rank of a block with the first ones of the others, so with 62 at most.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist

ONE_BLOCK = 64  # so many ranks are one block: their sockets do no harm


class HostExchange:
    """A channel of its own: collectives of two threads in one group would get mixed up. Making one is collective."""

    def __init__(self) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        blocks = blocks_of(world)
        self._block: Any = None
        self._leaders: Any = None
        self._groups: list[Any] = []
        for ranks in blocks:
            group = dist.new_group(ranks, backend="gloo")
            if rank in ranks:
                self._block, self._first, self._size = group, ranks[0], len(ranks)
                self._groups.append(group)
        self._blocks = len(blocks)
        if self._blocks > 1:
            leaders = [ranks[0] for ranks in blocks]
            group = dist.new_group(leaders, backend="gloo")
            if rank in leaders:
                self._leaders = group
                self._groups.append(group)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank. Collective."""
        block: list[Any] = [None] * self._size
        dist.all_gather_object(block, value, group=self._block)
        if self._blocks == 1:
            return block
        everything: list[Any] = [None] * self._blocks
        if self._leaders is not None:
            dist.all_gather_object(everything, block, group=self._leaders)
        dist.broadcast_object_list(everything, src=self._first, group=self._block)
        return [one for part in everything for one in part]

    def close(self) -> None:
        """Give the connections back; no rank may be in `gather`."""
        for group in self._groups:
            dist.destroy_process_group(group)


def blocks_of(world: int) -> list[list[int]]:
    """The ranks, in blocks of neighbours."""
    size = world if world <= ONE_BLOCK else math.ceil(math.sqrt(world))
    return [list(range(begin, min(begin + size, world))) for begin in range(0, world, size)]
