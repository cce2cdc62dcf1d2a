"""Memory of the losses at the size of the 1.3B config, counted to the byte on meta tensors."""

from __future__ import annotations

import pytest

from nextlat_dist.bench.loss_memory import measured

GB = 1e9


@pytest.mark.parametrize(
    ("rows", "horizon", "most_gb"),
    [(8, 0, 1.2), (8, 1, 1.2), (8, 2, 1.2), (8, 8, 1.2), pytest.param(33, 8, 2.5, marks=pytest.mark.slow)],
)
def test_peak_of_the_losses(rows: int, horizon: int, most_gb: float) -> None:
    found = measured(rows, 1024, horizon)
    assert found["peak_bytes"] <= most_gb * GB
    assert found["rows_of_logits"] <= 1024 + horizon


def test_whole_logits_are_seen() -> None:
    """The same count of the losses on whole logits: what the fused ones are for."""
    found = measured(8, 1024, 0, "training.fused_losses=false")
    assert found["peak_bytes"] > 5 * GB
    assert found["rows_of_logits"] == 8192
