"""Random state on disk: after loading it the next numbers are those that would have come."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as write

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


class FakeCuda:
    """As many GPUs as a host has, each with a state; the rank's own is the current one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: int, current: int) -> None:
        self.states = [torch.full((16,), device, dtype=torch.uint8) for device in range(devices)]
        self.current = current
        monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(self.states))
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def get(self, device: int | None = None) -> torch.Tensor:
        return self.states[self.current if device is None else device]

    def set(self, state: torch.Tensor, device: int | None = None) -> None:
        self.states[self.current if device is None else device] = state


def test_only_the_ranks_own_device_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, devices=8, current=5)
    save(tmp_path, 5)
    with safe_open(tmp_path / rng_file(5), "pt") as file:
        assert [key for key in file.keys() if key.startswith("cuda")] == ["cuda"]  # noqa: SIM118
        assert file.get_tensor("cuda").tolist() == [5] * 16


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_host_with_fewer_gpus_resumes(devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, devices=8, current=5)
    save(tmp_path, 5)
    here = FakeCuda(monkeypatch, devices, current=5 % devices)
    here.states[here.current] = torch.zeros(16, dtype=torch.uint8)
    others = [state.clone() for state in here.states]
    load_rng(tmp_path, 5)
    assert here.states[here.current].tolist() == [5] * 16
    assert all(
        torch.equal(one, other)
        for i, (one, other) in enumerate(zip(here.states, others, strict=True))
        if i != here.current
    )


@pytest.mark.parametrize(("rank", "own"), [(0, 0), (5, 5), (9, 1)])
def test_a_checkpoint_that_holds_every_device_is_read(
    rank: int, own: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were written before: rank 9 is the second of the second host of eight."""
    every = {f"cuda_{device}": torch.full((16,), device, dtype=torch.uint8) for device in range(8)}
    save(tmp_path, rank)
    with safe_open(tmp_path / rng_file(rank), "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    (tmp_path / rng_file(rank)).write_bytes(write({**tensors, **every}, metadata=metadata))
    here = FakeCuda(monkeypatch, devices=1, current=0)
    load_rng(tmp_path, rank)
    assert here.states[0].tolist() == [own] * 16


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
