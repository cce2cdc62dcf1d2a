"""Random state of one rank as safetensors: python, numpy, torch CPU, the rank's own CUDA device, Megatron's, no pickle.

The state of the other devices of its host is other ranks' to save: a host with fewer GPUs can resume.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

OWN_DEVICE = "cuda"
_EVERY_DEVICE = "cuda_"  # and a number: what checkpoints held before


def rng_file(rank: int) -> str:
    return f"rng/rank_{rank:05d}.safetensors"


def rng_state() -> bytes:
    """This rank's random state: content of its file."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_available():
        tensors[OWN_DEVICE] = torch.cuda.get_rng_state()
    for name_of, state in _megatron_states().items():
        tensors[f"megatron/{name_of}"] = state
    version, words, gauss = random.getstate()
    metadata = {
        "python": json.dumps([version, list(words), gauss]),
        "numpy": json.dumps([str(name), int(position), int(has_gauss), float(cached)]),
    }
    return save(tensors, metadata=metadata)


def load_rng(checkpoint: Path, rank: int) -> None:
    """Restore what `rng_state` gave on this rank; a rank that the saved run did not have keeps its own state."""
    if not (checkpoint / rng_file(rank)).exists():
        return
    with safe_open(checkpoint / rng_file(rank), framework="pt") as file:
        metadata = file.metadata()
        torch.set_rng_state(file.get_tensor("torch"))
        name, position, has_gauss, cached = json.loads(metadata["numpy"])
        np.random.set_state((name, file.get_tensor("numpy").numpy().astype(np.uint32), position, has_gauss, cached))
        own = _own_device(rank, set(file.keys()))
        if own is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor(own))
        megatron = {k.removeprefix("megatron/"): file.get_tensor(k) for k in file.keys() if k.startswith("megatron/")}  # noqa: SIM118
        if megatron:
            _megatron_tracker().set_states(megatron)
    version, words, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(words), gauss))


def _own_device(rank: int, keys: set[str]) -> str | None:
    """Where the state of the device that `rank` had is kept; None: the saved run had no GPU.

    Checkpoints once held all devices of a rank's host; ranks take the devices of a host in order.
    """
    if OWN_DEVICE in keys:
        return OWN_DEVICE
    devices = sum(key.startswith(_EVERY_DEVICE) for key in keys)
    return f"{_EVERY_DEVICE}{rank % devices}" if devices else None


def _megatron_tracker() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()


def _megatron_states() -> dict[str, torch.Tensor]:
    """Megatron-Core's states by name; it has some on GPUs only, and none before it was imported."""
    if "megatron.core.tensor_parallel.random" not in sys.modules:
        return {}
    states: dict[str, torch.Tensor] = _megatron_tracker().get_states()
    return states
