"""Every layout of a matrix computes the same product."""

from __future__ import annotations

import time

import pytest
import torch

from nextlat_dist.inference.engine import linear as layouts
from nextlat_dist.inference.engine.linear import BLOCK_FROM_ELEMENTS, BLOCK_ROWS, linear


@pytest.mark.parametrize("rows", [1, 2, 4, 9, 200])
@pytest.mark.parametrize("shape", [(24, 40), (512, 160), (130, 1000), (600, 500)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-13), (torch.bfloat16, 3e-2)]
)
def test_product(shape: tuple[int, int], rows: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
    x = torch.randn(rows, shape[1], generator=generator, dtype=torch.float64)
    weight, x = weight.to(dtype), x.to(dtype)
    result = linear(weight)(x)
    assert result.dtype == dtype
    assert result.shape == (rows, shape[0])
    expected = x.double() @ weight.double().t()
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_shapes_cover_both_layouts() -> None:
    assert 130 * 1000 < BLOCK_FROM_ELEMENTS <= 600 * 500
    assert [rows in BLOCK_ROWS for rows in (1, 2, 4, 9, 200)] == [False, False, True, True, False]


def test_one_row_never_takes_the_blocked_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is slower there, and plain decoding is the baseline of every speedup."""
    monkeypatch.setattr(layouts, "blocked_product", lambda weight: pytest.fail("one row went to the blocked layout"))
    product = linear(torch.randn(600, 500))
    assert product(torch.randn(1, 500)).shape == (1, 600)


def test_a_few_rows_of_a_large_matrix_take_the_blocked_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once, when it is first needed: plain decoding does not pay its memory."""
    made: list[torch.Size] = []
    blocked_product = layouts.blocked_product

    def counted(weight: torch.Tensor) -> layouts.Product:
        made.append(weight.shape)
        return blocked_product(weight)

    monkeypatch.setattr(layouts, "blocked_product", counted)
    product = linear(torch.randn(600, 500))
    assert made == []
    for rows in (4, 5, 4):
        product(torch.randn(rows, 500))
    assert made == [torch.Size([600, 500])]


@pytest.mark.slow
def test_plain_decoding_is_as_fast_as_the_fastest_product_of_one_row() -> None:
    """Every product of one row that torch offers, in alternation; the least time of each counts."""
    weight = torch.randn(4096, 512)  # 8 MB: beyond a core's own caches
    transposed, x = weight.t().contiguous(), torch.randn(1, 512)
    kinds = {
        "ours": linear(weight),
        "transposed": lambda x: torch.mm(x, transposed),
        "rows": lambda x: torch.nn.functional.linear(x, weight),
        "blocked": layouts.blocked_product(weight),
    }
    seconds = {name: float("inf") for name in kinds}
    for _ in range(30):
        for name, product in kinds.items():
            started = time.perf_counter()
            product(x)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    assert seconds["ours"] < 1.2 * min(seconds.values()), seconds
