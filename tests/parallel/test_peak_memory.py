"""The peak of memory is that since the last call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextlat_dist.parallel.device import take_peak_memory

CPU, BALLAST = torch.device("cpu"), 256 * 1024**2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_what_was_freed_before_counts_no_more() -> None:
    take_peak_memory(CPU)
    before = take_peak_memory(CPU)
    torch.ones(BALLAST, dtype=torch.uint8)
    assert BALLAST * 0.9 < take_peak_memory(CPU) - before < BALLAST * 1.5
    assert take_peak_memory(CPU) - before < BALLAST * 0.5


def test_without_proc_it_is_the_peak_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refused)
    assert 10 * 1024**2 < take_peak_memory(CPU) < 2**40
