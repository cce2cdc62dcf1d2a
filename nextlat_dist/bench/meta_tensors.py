"""Training without a GPU's memory or arithmetic: modules and batches on meta tensors, in a fake process group.

A fake group answers every collective at once and without numbers, so a rank of a large layout runs in one process. What
runs here must run in a process of its own: it has the default group.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nextlat_dist.config.load import load_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.config.shipped import shipped_path
from nextlat_dist.parallel.dims import ParallelDims


def fake_ranks(world_size: int, rank: int = 0) -> None:
    """This process is `rank` of a fake group; what asks for the current device gets meta."""
    import os

    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel = functools.partial(
        parallel_state.initialize_model_parallel, create_gloo_process_groups=False
    )


def meta_config(name: str, overrides: Iterable[str]) -> tuple[RunConfig, ParallelDims]:
    """A shipped configuration with overrides, and its layout in the fake group."""
    config = load_config(shipped_path(name), list(overrides))
    dims = ParallelDims.initialize(config.parallel)
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    return config, dims


def on_meta(build: Any, dtype: torch.dtype) -> nn.Module:
    """The module that `build()` makes, its parameters of `dtype` on meta."""
    with torch.device("meta"):
        module: nn.Module = build()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to("meta", dtype))
    return module


class Storages(TorchDispatchMode):
    """Bytes of the storages that operations make and that are alive, to the byte, as an allocator that rounds nothing
    would see them.

    Attributes:
        peak: the most that was alive at a time, of those not left out.
        seen: the shapes of all tensors that were made.
    """

    def __init__(self, leave_out: Iterable[torch.Tensor] = (), shapes: Iterable[tuple[int, ...]] = ()) -> None:
        """
        Args:
            leave_out: tensors that are there already.
            shapes: of tensors that do not count.
        """
        super().__init__()
        self._left_out = {tensor.untyped_storage()._cdata for tensor in leave_out}
        self._shapes = set(shapes)
        self._alive: dict[int, list[int]] = {}  # bytes and number of tensors of each storage
        self._now = self.peak = 0
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.note(value)
        return out

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.seen.add(tuple(tensor.shape))
        if key in self._left_out:
            return
        if key not in self._alive:
            size = 0 if tuple(tensor.shape) in self._shapes else storage.nbytes()
            self._alive[key] = [size, 0]
            self._now += size
            self.peak = max(self.peak, self._now)
        self._alive[key][1] += 1
        weakref.finalize(tensor, self._gone, key)

    def _gone(self, key: int) -> None:
        entry = self._alive.get(key)
        if entry is None:
            return
        entry[1] -= 1
        if entry[1] == 0:
            self._now -= entry[0]
            del self._alive[key]
