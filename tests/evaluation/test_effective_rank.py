"""The effective rank of matrices whose singular values are known."""

from __future__ import annotations

import math

import pytest
import torch

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.effective_rank import effective_rank, effective_rank_of_logits


def test_diagonal_matrix_by_hand() -> None:
    """Singular values 3 and 1: shares 3/4 and 1/4, exp(entropy) = 4 / 3^(3/4)."""
    states = torch.tensor([[3.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert effective_rank(states) == pytest.approx(4 / 3**0.75, rel=1e-12)


def test_a_rotation_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    values = torch.zeros(40, 6, dtype=torch.float64)
    values[:6] = torch.diag(torch.tensor([5.0, 3.0, 2.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    by_hand = math.exp(-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)))
    assert effective_rank(left @ values @ right) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_equal_directions_count_one_each_at_any_scale(scale: float) -> None:
    assert effective_rank(scale * torch.eye(7)) == pytest.approx(7, rel=1e-12)
    assert effective_rank(scale * torch.ones(5, 3)) == pytest.approx(1, abs=1e-6)


def test_states_are_not_centred() -> None:
    """[[1, 1], [1, -1]] has two equal singular values; without its column mean it would have one."""
    assert effective_rank(torch.tensor([[1.0, 1.0], [1.0, -1.0]])) == pytest.approx(2, rel=1e-12)


def test_singular_values_below_the_bound_are_dropped() -> None:
    """Without the bound, these would be eight equal directions."""
    assert effective_rank(torch.diag(torch.full((8,), 0.9e-12, dtype=torch.float64))) == 0.0
    assert effective_rank(torch.diag(torch.full((8,), 1.1e-12, dtype=torch.float64))) == pytest.approx(8)
    assert effective_rank(torch.zeros(4, 4)) == 0.0


def test_states_that_are_not_finite_are_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"hidden states of shape \[2, 2\] hold NaN or infinity"):
        effective_rank(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))


@pytest.mark.parametrize("vocab", [4, 90])
def test_logits_have_the_rank_of_the_whole_product(vocab: int) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(40, 8, generator=generator) * torch.linspace(0.1, 3, 8)
    weight = torch.randn(vocab, 8, generator=generator) * torch.linspace(4, 0.2, 8)
    whole = effective_rank(states.double() @ weight.double().t())
    assert effective_rank_of_logits(states, weight) == pytest.approx(whole, rel=1e-9)
    assert abs(whole - effective_rank(states)) > 0.1  # or the two would be one metric
