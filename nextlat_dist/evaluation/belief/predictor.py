"""A p_ψ fitted afterwards, with which a model that has no latent predictor is rolled out, for a fair comparison.

    fit_predictor(model: ExportModel, tokens: Tensor, width: int, seed: int) -> FittedPredictor

The architecture and the losses of the method at horizon 1 (smooth L1 to the next state, KL between the head's
distributions), on frozen states of training documents; only p_ψ learns. Invariant: the model itself is not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from nextlat_dist.evaluation.state_model import ExportModel

# Measured on mess3 in a model of random weights (hidden size and width 32): the error of a step, relative to the spread
# of states, is 0.85, 0.79, 0.74 and 0.71 after 375, 750, 1500 and 3000 steps.
STEPS, BATCH, LR = 1500, 512, 2e-3


class _ResidualMLP(nn.Module):
    """h + MLP(LayerNorm([h, e])), no biases in the MLP; arXiv 2511.05963."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(2 * hidden)
        out = nn.Linear(width, hidden, bias=False)
        nn.init.zeros_(out.weight)  # begin as the identity
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, width, bias=False),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
            nn.GELU(),
            out,
        )

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        update: Tensor = self.mlp(self.layer_norm(torch.cat([h, embedded], dim=-1)))
        return h + update


class FittedPredictor:
    """The model with a fitted p_ψ instead of its own: a `StateModel`."""

    has_predictor = True

    def __init__(self, model: ExportModel, predictor: _ResidualMLP) -> None:
        self.model, self.predictor = model, predictor
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size

    def states(self, tokens: Tensor) -> Tensor:
        return self.model.states(tokens)

    def logits(self, states: Tensor) -> Tensor:
        return self.model.logits(states)

    @torch.no_grad()
    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        predicted: Tensor = self.predictor(states, self.model.embedding[tokens.to(states.device)])
        return predicted


def fit_predictor(model: ExportModel, tokens: Tensor, width: int, seed: int) -> FittedPredictor:
    """Fit on documents `tokens` int64 [n, length + 1] for `STEPS` steps of `BATCH` transitions."""
    states = model.states(tokens)
    tokens = tokens.to(states.device)
    h, x, target = states[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), states[:, 1:].flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = _ResidualMLP(model.hidden_size, width).to(states)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(len(h), (BATCH,), generator=generator).to(h.device)
        predicted = predictor(h[rows], model.embedding[x[rows]])
        teacher = functional.linear(target[rows], model.head_weight).log_softmax(dim=-1)
        student = functional.linear(predicted, model.head_weight).log_softmax(dim=-1)
        kl = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = functional.smooth_l1_loss(predicted, target[rows]) + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return FittedPredictor(model, predictor)
