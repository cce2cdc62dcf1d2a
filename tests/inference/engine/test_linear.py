"""Every layout of a matrix computes the same product."""

from __future__ import annotations

import pytest
import torch

from nextlat_dist.inference.engine.linear import PACK_FROM_ELEMENTS, linear


@pytest.mark.parametrize("rows", [1, 2, 4, 9, 200])
@pytest.mark.parametrize("shape", [(24, 40), (512, 160), (130, 1000)])
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
    assert 24 * 40 < PACK_FROM_ELEMENTS <= 512 * 160
