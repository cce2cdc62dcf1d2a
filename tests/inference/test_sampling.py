"""The warped distribution against transformers' own warpers, and the draw against the cumulative distribution."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nextlat_dist.errors import UserError
from nextlat_dist.inference import sampling
from nextlat_dist.inference.sampling import PREFIX, Sampling, draw


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.4, 1e-6])
def test_probabilities_equal_the_warpers_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(min(top_k, 40))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    result = Sampling(temperature, top_k, top_p).probabilities(logits)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, expected.softmax(dim=-1), rtol=1e-12, atol=1e-14)


def _by_sorting(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest set whose mass reaches top_p, from the whole vocabulary in order."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, order, kept)


@pytest.mark.parametrize("top_p", [0.999999, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])  # all alike, a mass that the prefix does not hold, one that it does
def test_top_p_of_a_large_vocabulary_is_that_of_sorting_all_of_it(top_p: float, spread: float) -> None:
    """To the bit, with ties at the edge and inside, one row at a time and together."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 5 * PREFIX, generator=generator) * spread
    logits[1] = logits[1].round()  # ties
    logits[2, : 4 * PREFIX] = -torch.inf
    probabilities = logits.softmax(dim=-1)
    expected = _by_sorting(probabilities, top_p)
    assert torch.equal(sampling.nucleus(probabilities, top_p), expected)
    for row in range(3):
        assert torch.equal(sampling.nucleus(probabilities[row], top_p), expected[row])


def test_top_p_sorts_only_the_rows_whose_prefix_falls_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = sampling._sorted_nucleus

    def counted(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
        seen.append(len(probabilities))
        return whole(probabilities, top_p)

    monkeypatch.setattr(sampling, "_sorted_nucleus", counted)
    logits = torch.randn(4, 4 * PREFIX, generator=torch.Generator().manual_seed(0)) * 5
    sampling.nucleus(logits.softmax(dim=-1), 0.9)
    assert seen == []
    logits[2] /= 50
    sampling.nucleus(logits.softmax(dim=-1), 0.9)
    assert seen == [1]


def test_bf16_logits_are_warped_in_fp32() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = Sampling(temperature=0.7).probabilities(logits)
    torch.testing.assert_close(result, (logits.float() / 0.7).softmax(-1))


def test_draw_takes_each_token_over_exactly_its_interval() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    at = [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (math.nextafter(1.0, 0.0), 4)]
    uniforms = torch.tensor([uniform for uniform, _ in at], dtype=torch.float64)
    for scale in (1.0, 3.0):  # weights need not sum to 1
        assert draw(scale * weights.expand(len(at), -1), uniforms).tolist() == [token for _, token in at]


def test_draw_never_leaves_the_support() -> None:
    """Sums that are not exactly 1, and the largest uniform number there is."""
    for seed in range(300):
        weights = torch.rand(2, 17, generator=torch.Generator().manual_seed(seed))
        weights[:, ::2] = 0
        uniforms = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
        assert (weights.gather(1, draw(weights, uniforms)[:, None]) > 0).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option} is .*change {option}"):
        Sampling(**{option: value})
