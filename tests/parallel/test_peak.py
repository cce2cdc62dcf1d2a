"""The peak that MFU is relative to: the data sheet of a known GPU, a bf16 product on another, nothing on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nextlat_dist.config import load_config
from nextlat_dist.parallel import device
from nextlat_dist.parallel.device import known_peak_tflops, measured_tflops, peak_tflops
from nextlat_dist.training.metrics import Throughput


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_known_devices(name: str, peak: float) -> None:
    found = known_peak_tflops(name)
    assert found is not None
    assert found[0] == peak


@pytest.mark.parametrize(
    "name",
    ["Tesla V100-SXM2-16GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA A10G"],
)
def test_a_name_that_only_looks_like_one_is_not_known(name: str) -> None:
    assert known_peak_tflops(name) is None


def test_an_unknown_gpu_is_measured_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Tomorrow 1")
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(device, "measured_tflops", lambda where: 7.5)
    assert peak_tflops() == (7.5, "measured bf16 matrix product; NVIDIA Tomorrow 1 is not in the table")


class Products(TorchFunctionMode):
    """Types of the factors of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[tuple[torch.dtype, ...]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("matmul", "__matmul__"):
            self.types.add(tuple(arg.dtype for arg in args))
        return func(*args, **(kwargs or {}))


def test_the_measurement_is_of_bf16_products_and_draws_no_number() -> None:
    state = torch.get_rng_state()
    with Products() as seen:
        assert measured_tflops(torch.device("cpu"), size=64, seconds=0.02) > 0
    assert seen.types == {(torch.bfloat16, torch.bfloat16)}
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cpu_has_no_mfu_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    assert peak_tflops() is None
    throughput = Throughput(load_config(None), 1)
    throughput.count(100, 100)
    assert throughput.reference == ""
    assert throughput.read()[1] is None
    asked = Throughput(load_config(None, ["training.peak_tflops_per_device=0.5"]), 1)
    asked.count(100, 100)
    assert asked.reference == "0.5 TFLOP/s per device (training.peak_tflops_per_device)"
    assert (asked.read()[1] or 0) > 0
