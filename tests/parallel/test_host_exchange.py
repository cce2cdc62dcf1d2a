"""Every rank hears every other, in order, with few connections."""

from __future__ import annotations

from typing import Any

import pytest

from nextlat_dist.parallel import host_exchange
from nextlat_dist.parallel.host_exchange import HostExchange, blocks_of
from tests.kit import jobs
from tests.kit.harness import Ranks


@pytest.mark.parametrize("world", [1, 2, 64, 65, 100, 1000, 1024, 4096])
def test_blocks_hold_every_rank_once_and_few_connections(world: int) -> None:
    blocks = blocks_of(world)
    assert [rank for block in blocks for rank in block] == list(range(world))
    connections = max(len(block) for block in blocks) - 1 + len(blocks) - 1
    assert connections <= max(63, 2 * world**0.5)


def exchanged(one_block: int) -> list[list[Any]]:
    import torch.distributed as dist

    before, host_exchange.ONE_BLOCK = host_exchange.ONE_BLOCK, one_block
    try:
        exchange = HostExchange()
        rank = dist.get_rank()
        answers = [exchange.gather(("from", rank)), exchange.gather("x" * 10**rank)]
        exchange.close()
    finally:
        host_exchange.ONE_BLOCK = before
    return answers


@pytest.mark.parametrize("one_block", [4, 3], ids=["one block", "blocks of two"])
def test_everyone_hears_everyone_in_order(one_block: int, four_ranks: Ranks) -> None:
    for answers in four_ranks.run(exchanged, one_block):
        assert answers == [[("from", rank) for rank in range(4)], ["x" * 10**rank for rank in range(4)]]


def gloo_groups_of_megatron() -> bool:
    from megatron.core import parallel_state

    jobs.set_up(jobs.tiny_config())
    return parallel_state._DATA_PARALLEL_GROUP_GLOO is not None


def test_megatrons_own_gloo_groups_are_not_made(one_rank: Ranks) -> None:
    assert one_rank.run(gloo_groups_of_megatron) == [False]
