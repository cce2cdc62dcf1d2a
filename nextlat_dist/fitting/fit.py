"""The losses of the method on frozen states, where only the latent predictor learns.

    fit(form, weights, batches, embedding=…, head_weight=…, steps=600) -> weights

A batch is windows of a base's states: the predictor is rolled over each, fed the true tokens, and held to the states
that the base had there (smooth L1) and to what its head says of them (KL); arXiv 2511.05963. The base gets no gradient,
and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nextlat_dist.inference.drafters.latent_predictor import Step

Form = Callable[[dict[str, Tensor], float], Step]  # weights, epsilon of its norms -> how it advances


@dataclass(frozen=True)
class Windows:
    """States of a frozen base around tokens.

    Attributes:
        before: h_t [windows, hidden].
        tokens: x_{t+1} .. x_{t+d} [windows, d].
        after: h_{t+1} .. h_{t+d} [windows, d, hidden].
    """

    before: Tensor
    tokens: Tensor
    after: Tensor

    @classmethod
    def of(cls, states: Tensor, tokens: Tensor, horizon: int) -> Windows:
        """All of one document of at least `horizon` + 1 tokens: states [s, hidden], tokens [s]."""
        last = len(tokens) - horizon
        tokens, after = tokens[1:].unfold(0, horizon, 1), states[1:].unfold(0, horizon, 1)
        return cls(states[:last], tokens, after.transpose(1, 2))

    @classmethod
    def joined(cls, parts: list[Windows]) -> Windows:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("before", "tokens", "after")))


def fit(
    form: Form,
    weights: Mapping[str, Tensor],
    batches: Iterator[Windows],
    *,
    embedding: Tensor,
    head_weight: Tensor,
    steps: int,
    epsilon: float = 1e-5,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    lambda_hidden: float = 1.0,
    lambda_kl: float = 1.0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Tensor]:
    """Weights of a predictor of that form, from `weights` on: AdamW, a learning rate that falls as a cosine to 0.

    Args:
        batches: at least `steps` of them.
        embedding: e [vocab, hidden]. head_weight: W [vocab, hidden].
        epsilon: of the predictor's norms.
        on_step: called with (steps done, loss).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    learnt = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(learnt.values(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for number in range(1, steps + 1):
        step = form(learnt, epsilon)  # of the weights as they are now
        loss = rollout_loss(step, next(batches), embedding, head_weight, lambda_hidden, lambda_kl)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {number} is {value}")
        on_step(number, value)
    return {name: weight.detach() for name, weight in learnt.items()}


def rollout_loss(
    step: Step,
    windows: Windows,
    embedding: Tensor,
    head_weight: Tensor,
    lambda_hidden: float = 1.0,
    lambda_kl: float = 1.0,
) -> Tensor:
    """The weighted mean over windows and steps ahead."""
    state, horizon = windows.before, windows.tokens.shape[1]
    losses = []
    for ahead in range(horizon):
        state = step(state, embedding[windows.tokens[:, ahead]])
        target = windows.after[:, ahead]
        teacher = functional.linear(target, head_weight).log_softmax(dim=-1)
        student = functional.linear(state, head_weight).log_softmax(dim=-1)
        kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        losses.append(lambda_hidden * functional.smooth_l1_loss(state, target) + lambda_kl * kl)
    return torch.stack(losses).sum() / horizon


def first_weights(hidden: int, width: int, seed: int) -> dict[str, Tensor]:
    """Of a new predictor in the paper's form: it begins as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shapes = {"linear_out": (width, hidden), "linear_in": (2 * hidden, width), "linear_mid": (width, width)}
        linears = {name: torch.nn.Linear(*sizes, bias=False).weight.detach() for name, sizes in shapes.items()}
    return {
        "layer_norm.weight": torch.ones(2 * hidden),
        "layer_norm.bias": torch.zeros(2 * hidden),
        "linear_in.weight": linears["linear_in"],
        "linear_mid.weight": linears["linear_mid"],
        "linear_out.weight": torch.zeros_like(linears["linear_out"]),
    }
