"""The accelerator: CUDA where there is one, else the CPU as a first-class citizen.

Without CUDA, Megatron-Core still asks `torch.cuda` for the current device in about ninety places, also while it is
imported; `third_parties` answers with the CPU as long as its block runs, and leaves torch as it was. A process that is
ours alone (a rank, a command) may call `use_cpu_where_no_cuda` instead, for good.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

QUIET_LOGGERS = ("DeepSpeed", "deepspeed")
KNOWN_PEAK_TFLOPS = {  # dense bf16, from the vendor's data sheets
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}


def has_cuda() -> bool:
    return torch.cuda.is_available()


@contextmanager
def third_parties() -> Iterator[None]:
    """Inside, Megatron-Core and DeepSpeed run on this machine, and quietly; then torch and logging are as before."""
    stood_in = torch.cuda.current_device, torch.cuda.synchronize
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    accelerator = os.environ.get("DS_ACCELERATOR")
    with warnings.catch_warnings():
        use_cpu_where_no_cuda()
        quiet_third_parties()
        try:
            yield
        finally:
            torch.cuda.current_device, torch.cuda.synchronize = stood_in
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if accelerator is None:
                os.environ.pop("DS_ACCELERATOR", None)


def use_cpu_where_no_cuda() -> None:
    """Make Megatron-Core and DeepSpeed run in this process from now on; does nothing where there is CUDA."""
    if has_cuda():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None


def quiet_third_parties() -> None:
    """Silence remarks about optional GPU packages and deprecations, so that a run's own lines can be read."""
    optional = (".*Apex.*", ".*Transformer Engine.*", ".*transformer_engine.*", ".*pynvml.*", ".*NVIDIA.*")
    deprecated = (
        "full scope is deprecated",
        ".*torch.distributed.* is deprecated",
    )  # inside Megatron-Core and DeepSpeed
    for pattern in (*optional, *deprecated):
        warnings.filterwarnings("ignore", message=pattern)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def device() -> torch.device:
    """This rank's device; sets the current CUDA device from LOCAL_RANK."""
    if not has_cuda():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def communication_backend() -> str:
    return "nccl" if has_cuda() else "gloo"


def peak_tflops() -> tuple[float, str]:
    """Peak of one device in TFLOP/s and where the number comes from: the data sheet, or a half-second matmul."""
    if has_cuda():
        name = torch.cuda.get_device_name()
        for key, value in KNOWN_PEAK_TFLOPS.items():
            if key in name:
                return value, f"data sheet of {key}, dense bf16"
    size, rounds = 1024, 0
    # No random numbers: a measurement must not move the state that a resume restored.
    left = torch.full((size, size), 0.5, device=device())
    right = torch.full((size, size), 0.25, device=device())
    left @ right
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.5:
        (left @ right).sum().item()
        rounds += 1
    return 2 * size**3 * rounds / elapsed / 1e12, f"measured fp32 matmul of {size}x{size}"
