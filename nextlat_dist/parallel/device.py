"""The accelerator: CUDA where there is one, else the CPU as a first-class citizen.

Without CUDA, Megatron-Core still asks `torch.cuda` for the current device in about ninety places, also while it is
imported; `third_parties` answers with the CPU as long as its block runs, and leaves torch as it was. A process that is
ours alone (a rank, a command) may call `use_cpu_where_no_cuda` instead, for good.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nextlat_dist.parallel.environment import launched_number

QUIET_LOGGERS = ("DeepSpeed", "deepspeed")
# Dense bf16 with fp32 accumulation, from the vendor's data sheets (half of what they give for sparse matrices). What a
# device's name must hold, as words, the more special first; a name that none fits is measured.
KNOWN_PEAK_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("H200", "NVL"), 835.5),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("H100", "PCIe"), 756.5),
    (("H100", "HBM2e"), 756.5),  # another name of the PCIe card
    (("H100", "NVL"), 835.5),
    (("H100",), 989.0),
    (("H800", "PCIe"), 756.5),
    (("H800",), 989.0),
    (("H20",), 148.0),
    (("A100",), 312.0),
    (("A800",), 312.0),
    (("A40",), 149.7),
    (("A30",), 165.0),
    (("A10",), 125.0),
    (("L40S",), 362.0),
    (("L40",), 181.0),
    (("L4",), 121.0),
    (("RTX", "4090"), 165.2),
    (("RTX", "3090"), 71.0),
)
OTHER_PRODUCTS = {"MIG", "Laptop", "D", "Ti"}  # a word that makes it another device than the table's


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


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, torch takes kernels whose result depends on their input alone, or raises where it has none.

    On a GPU the backward pass of fused attention, and what adds up with atomics, otherwise differ from call to call in
    the last bits. cuBLAS reads its workspace setting at its first use, so this comes before anything on the GPU.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


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
    index = launched_number("LOCAL_RANK", 0)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def pending_work(where: torch.device) -> Callable[[], bool]:
    """A question that any thread may ask: has the stream that is current here work that is not done? Never on a CPU.

    Asking neither waits nor takes anything from the stream.
    """
    if where.type != "cuda":
        return lambda: False
    stream = torch.cuda.current_stream(where)
    return lambda: not stream.query()


def take_peak_memory(where: torch.device) -> int:
    """Bytes of a GPU that tensors had at most, or of a CPU that this process had at most, since the last call.

    On a CPU without Linux's /proc: since the process began.
    """
    if where.type == "cuda":
        peak = torch.cuda.max_memory_allocated(where)
        torch.cuda.reset_peak_memory_stats(where)
        return peak
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # from here on
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def communication_backend() -> str:
    return "nccl" if has_cuda() else "gloo"


def known_peak_tflops(name: str) -> tuple[float, str] | None:
    """(peak in TFLOP/s, the words of the data sheet's product) of a device by its name; None: not in the table."""
    parts = set(name.replace("-", " ").split())
    for words, peak in KNOWN_PEAK_TFLOPS:
        if parts.issuperset(words) and not parts & OTHER_PRODUCTS:
            return peak, " ".join(words)
    return None


def peak_tflops() -> tuple[float, str] | None:
    """Peak of one device in TFLOP/s and where the number comes from: the data sheet, or a short bf16 matrix product.

    None on a CPU: it has no peak that says anything. Its clock and its cores are shared, and a product measured at the
    start of a run was 15 times another one.
    """
    if not has_cuda():
        return None
    name = torch.cuda.get_device_name()
    known = known_peak_tflops(name)
    if known is not None:
        return known[0], f"data sheet of {known[1]}, dense bf16"
    return measured_tflops(device()), f"measured bf16 matrix product; {name} is not in the table"


def measured_tflops(where: torch.device, size: int = 8192, seconds: float = 0.5) -> float:
    """TFLOP/s of a bf16 matrix product of size x size on a device, the best of a few batches of them."""
    # No random numbers: a measurement must not move the state that a resume restored.
    left = torch.full((size, size), 0.5, device=where, dtype=torch.bfloat16)
    right = torch.full((size, size), 0.25, device=where, dtype=torch.bfloat16)
    read = torch.zeros((), device=where)
    best, batch, begin = 0.0, 1, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        for _ in range(batch):
            product = left @ right
        read.copy_(product[0, 0]).item()  # the device has done them all
        elapsed = time.perf_counter() - start
        best = max(best, 2 * size**3 * batch / elapsed / 1e12)
        batch = max(1, min(64, int(batch * 0.05 / elapsed)))  # so many that the read at the end costs little
    return best
