"""Pools of real ranks, started when a test first asks for them and shared by all tests of a session."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.harness import Ranks

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _pool(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    yield from _pool(1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    yield from _pool(4)
