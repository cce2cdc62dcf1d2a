"""The losses on frozen states: against the equations written out, and what they teach."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nextlat_dist.fitting.fit import Windows, first_weights, fit, rollout_loss
from nextlat_dist.inference.drafters.latent_predictor import concat_step

HIDDEN, WIDTH, VOCABULARY, LENGTH, HORIZON = 6, 10, 9, 12, 3


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor]:
    """(a predictor, e, W, states of a document, its tokens)"""
    first = first_weights(HIDDEN, WIDTH, seed=0)
    weights = {name: tensor.double() + 0.3 * drawn(*tensor.shape, seed=1) for name, tensor in first.items()}
    tokens = torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(2))
    return (
        weights,
        drawn(VOCABULARY, HIDDEN, seed=3),
        drawn(VOCABULARY, HIDDEN, seed=4),
        drawn(LENGTH, HIDDEN, seed=5),
        tokens,
    )


def by_hand(
    weights: dict[str, Tensor], e: Tensor, w: Tensor, h: Tensor, x: Tensor, of_h: float, of_kl: float
) -> Tensor:
    """For every place t and every step i: p(… p(h_t, x_{t+1}) …, x_{t+i}) against h_{t+i}, a number at a time."""
    losses = []
    for i, t in itertools.product(range(1, HORIZON + 1), range(LENGTH - HORIZON)):
        state = h[t]
        for k in range(1, i + 1):
            read = torch.cat([state, e[x[t + k]]])
            read = (read - read.mean()) / torch.sqrt(read.var(unbiased=False) + 1e-5)
            read = read * weights["layer_norm.weight"] + weights["layer_norm.bias"]
            inner = functional.gelu(weights["linear_mid.weight"] @ functional.gelu(weights["linear_in.weight"] @ read))
            state = state + weights["linear_out.weight"] @ inner
        error = (state - h[t + i]).abs()
        smooth = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
        teacher, student = torch.softmax(w @ h[t + i], 0), torch.softmax(w @ state, 0)
        losses.append(of_h * smooth + of_kl * (teacher * (teacher.log() - student.log())).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("of_h", "of_kl"), [(1.0, 1.0), (0.0, 1.0), (3.0, 0.0)])
def test_the_loss_and_its_gradients_are_those_of_the_equations(of_h: float, of_kl: float) -> None:
    weights, e, w, h, x = world()
    ours, theirs = ({name: tensor.clone().requires_grad_() for name, tensor in weights.items()} for _ in range(2))
    loss = rollout_loss(concat_step(ours, 1e-5), Windows.of(h, x, HORIZON), e, w, of_h, of_kl)
    expected = by_hand(theirs, e, w, h, x, of_h, of_kl)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    loss.backward()
    expected.backward()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.grad, theirs[name].grad, rtol=1e-10, atol=1e-12)


def test_a_window_begins_at_every_place_that_has_a_horizon_before_it() -> None:
    _, _, _, h, x = world()
    windows = Windows.of(h, x, HORIZON)
    assert len(windows.before) == LENGTH - HORIZON
    for t in range(LENGTH - HORIZON):
        assert torch.equal(windows.before[t], h[t])
        assert windows.tokens[t].tolist() == x[t + 1 : t + 1 + HORIZON].tolist()
        assert torch.equal(windows.after[t], h[t + 1 : t + 1 + HORIZON])
    twice = Windows.joined([windows, windows])
    assert len(twice.before) == len(twice.tokens) == len(twice.after) == 2 * (LENGTH - HORIZON)


def test_a_new_predictor_is_the_identity_and_only_it_learns() -> None:
    _, e, w, h, x = world()
    weights = {name: tensor.double() for name, tensor in first_weights(HIDDEN, WIDTH, seed=0).items()}
    assert torch.equal(concat_step(weights, 1e-5)(h, e[x]), h)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    frozen, losses = [tensor.clone() for tensor in (e, w, h)], []
    fitted = fit(
        concat_step,
        weights,
        itertools.repeat(Windows.of(h, x, 1)),
        embedding=e,
        head_weight=w,
        steps=400,
        lr=1e-2,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 400
    assert losses[-1] < 0.05 * losses[0]  # eleven transitions are learnt by heart
    assert all(torch.equal(now, then) for now, then in zip((e, w, h), frozen, strict=True))
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert not any(tensor.requires_grad for tensor in fitted.values())


def test_a_loss_that_is_not_finite_ends_the_fit() -> None:
    weights, e, w, h, x = world()
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(
            concat_step,
            weights,
            itertools.repeat(Windows.of(h * math.inf, x, 1)),
            embedding=e,
            head_weight=w,
            steps=3,
        )
