"""Random state on disk: after loading it the next numbers are those that would have come."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from nextlat_dist.checkpoint.rng import load_rng, rng_file, rng_state
from tests.kit.harness import Ranks


def save(checkpoint: Path, rank: int) -> None:
    path = checkpoint / rng_file(rank)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(rng_state())


def draw() -> list[float]:
    """The next numbers of every generator, normal ones too: those keep a second value in store."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
        *torch.randperm(20).double().tolist(),
    ]


@pytest.mark.parametrize("draws_before", [0, 1, 700])
def test_next_numbers_are_those_that_would_have_come(tmp_path: Path, draws_before: int) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    for _ in range(draws_before):
        draw()
    save(tmp_path, 0)
    expected = [draw() for _ in range(3)]
    random.seed(4), np.random.seed(5), torch.manual_seed(6)
    assert draw() != expected[0]
    load_rng(tmp_path, 0)
    assert [draw() for _ in range(3)] == expected


def test_saving_takes_no_number(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = draw()
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    save(tmp_path, 0)
    assert draw() == expected


def test_every_rank_has_its_own(tmp_path: Path) -> None:
    states = []
    for rank in (0, 1):
        random.seed(rank), np.random.seed(rank), torch.manual_seed(rank)
        save(tmp_path, rank)
        states.append(draw())
    assert rng_file(0) != rng_file(1)
    for rank in (1, 0):
        load_rng(tmp_path, rank)
        assert draw() == states[rank]


def megatron_states(root: Path) -> tuple[bool, bool]:
    """Whether Megatron-Core's named states come back, and whether there are none where none were."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.set_states({})
    (root / "empty").mkdir()
    save(root / "empty", 0)
    torch.manual_seed(5)
    states = {"model-parallel-rng": torch.get_rng_state()}
    tracker.set_states(dict(states))
    save(root, 0)
    tracker.set_states({"model-parallel-rng": torch.zeros_like(states["model-parallel-rng"])})
    load_rng(root, 0)
    same = torch.equal(tracker.get_states()["model-parallel-rng"], states["model-parallel-rng"])
    tracker.set_states({})
    load_rng(root / "empty", 0)
    return same, tracker.get_states() == {}


def test_megatrons_states_come_back(tmp_path: Path, one_rank: Ranks) -> None:
    assert one_rank.run(megatron_states, tmp_path) == [(True, True)]
