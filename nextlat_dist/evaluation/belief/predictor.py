"""A p_ψ fitted afterwards, with which a model that has no latent predictor is rolled out, for a fair comparison.

    fit_predictor(model: ExportModel, tokens: Tensor, width: int, seed: int) -> FittedPredictor

The architecture and the losses of the method at horizon 1 (`fitting.fit`), on frozen states of training documents; only
p_ψ learns. Invariant: the model itself is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nextlat_dist.fitting.fit import Windows, first_weights, fit
from nextlat_dist.inference.drafters.latent_predictor import Step, concat_step
from nextlat_dist.inference.state_model import ExportModel

# Measured on mess3 in a model of random weights (hidden size and width 32): the error of a step, relative to the spread
# of states, is 0.85, 0.79, 0.74 and 0.71 after 375, 750, 1500 and 3000 steps.
STEPS, BATCH, LR = 1500, 512, 2e-3
EPSILON = 1e-5


class FittedPredictor:
    """The model with a fitted p_ψ instead of its own: a `StateModel`."""

    has_predictor = True

    def __init__(self, model: ExportModel, step: Step) -> None:
        self.model, self._step = model, step
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size

    def states(self, tokens: Tensor) -> Tensor:
        return self.model.states(tokens)

    def logits(self, states: Tensor) -> Tensor:
        return self.model.logits(states)

    @torch.no_grad()
    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        embedded = self.model.embedding[tokens.to(states.device)]
        return self._step(states.reshape(-1, self.hidden_size), embedded.reshape(-1, self.hidden_size)).view_as(states)


def fit_predictor(model: ExportModel, tokens: Tensor, width: int, seed: int) -> FittedPredictor:
    """Fit on documents `tokens` int64 [n, length + 1] for `STEPS` steps of `BATCH` transitions."""
    weights = {name: first.to(model.embedding) for name, first in first_weights(model.hidden_size, width, seed).items()}
    found = fit(
        concat_step,
        weights,
        _transitions(model, tokens, seed),
        embedding=model.embedding,
        head_weight=model.head_weight,
        steps=STEPS,
        epsilon=EPSILON,
        lr=LR,
    )
    return FittedPredictor(model, concat_step(found, EPSILON))


def _transitions(model: ExportModel, tokens: Tensor, seed: int) -> Iterator[Windows]:
    states = model.states(tokens)
    tokens = tokens.to(states.device)
    h, x, target = states[:, :-1].flatten(0, 1), tokens[:, 1:].reshape(-1, 1), states[:, 1:].flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(h), (BATCH,), generator=generator).to(h.device)
        yield Windows(h[rows], x[rows], target[rows, None])
