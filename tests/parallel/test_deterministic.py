"""`training.deterministic` holds as long as a run does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat_dist.config import load_config
from nextlat_dist.parallel.device import deterministic_kernels
from nextlat_dist.training import run


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_has_deterministic_kernels_where_it_asks_for_them(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def train(*_: Any) -> None:
        seen.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )

    monkeypatch.setattr(run, "_train", train)
    monkeypatch.setattr(run.ParallelDims, "initialize", lambda _: None)
    monkeypatch.setattr(run, "shutdown", lambda: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run.train(load_config(None, ["data.train=nowhere", f"training.deterministic={str(wanted).lower()}"]))
    assert seen == [(wanted, False)]
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_was_set_before_is_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
