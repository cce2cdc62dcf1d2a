"""Can the exact belief be read off a state? A ridge regression and a small MLP, judged on documents held out.

    decodability(states: Tensor, histories: Histories, seed: int) -> dict[str, float]

R² is pooled over the states of the process: 1 - squared error / squared distance to the mean belief. The control fits
the same probes to beliefs that were shuffled, where nothing can be read; the floor is what the last token alone tells.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from nextlat_dist.evaluation.belief.data import Histories

# Measured on 200 documents of mess3 in a model of random weights (hidden size 32): the linear R² is 0.702 for any
# RIDGE from 1e-8 to 1e-3; that of the MLP is 0.772, 0.805, 0.828, 0.837 and 0.829 after 100 to 1600 steps.
RIDGE = 1e-6  # times the number of rows, on features of variance one
MLP_WIDTH, MLP_STEPS, MLP_BATCH, MLP_LR = 64, 400, 512, 5e-3


def decodability(states: Tensor, histories: Histories, seed: int) -> dict[str, float]:
    """`linear_r2`, `mlp_r2`, both again as `…_shuffled` (the control), and `last_token_r2` (the floor).

    Args:
        states: [n, length + 1, hidden] of the histories. Probes are fitted on the first half of them and judged on the
            second.
    """
    half = len(states) // 2
    fit_x, fit_y, x, y = _features(states, histories)
    generator = torch.Generator().manual_seed(seed)
    shuffled_fit_y, shuffled_y = (part[torch.randperm(len(part), generator=generator)] for part in (fit_y, y))
    return {
        "linear_r2": r_squared(_ridge(fit_x, fit_y, x), y),
        "mlp_r2": r_squared(_mlp(fit_x, fit_y, x, seed), y),
        "linear_r2_shuffled": r_squared(_ridge(fit_x, shuffled_fit_y, x), shuffled_y),
        "mlp_r2_shuffled": r_squared(_mlp(fit_x, shuffled_fit_y, x, seed), shuffled_y),
        "last_token_r2": r_squared(torch.from_numpy(_from_last_token(histories, half)), y),
    }


def r_squared(predicted: Tensor, y: Tensor) -> float:
    """1 - Σ (y - predicted)² / Σ (y - mean y)², over rows and columns; [rows, columns] each."""
    return 1 - float(((y - predicted) ** 2).sum() / ((y - y.mean(dim=0)) ** 2).sum())


def decoded(states: Tensor, histories: Histories) -> np.ndarray:
    """The beliefs that the linear probe reads off the second half of the documents, [rows, states of the process]."""
    fit_x, fit_y, x, _ = _features(states, histories)
    return _ridge(fit_x, fit_y, x).numpy()


def _features(states: Tensor, histories: Histories) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised states and beliefs of the first half of the documents, then of the second: float64 [rows, …]."""
    half, width = len(states) // 2, states.shape[-1]
    fit_x, x = (part.double().reshape(-1, width).cpu() for part in (states[:half], states[half:]))
    mean, spread = fit_x.mean(dim=0), fit_x.std(dim=0)
    spread = torch.where(spread > 0, spread, 1.0)
    beliefs = torch.from_numpy(histories.beliefs)
    fit_y, y = (part.reshape(-1, beliefs.shape[-1]) for part in (beliefs[:half], beliefs[half:]))
    return (fit_x - mean) / spread, fit_y, (x - mean) / spread, y


def _ridge(fit_x: Tensor, fit_y: Tensor, x: Tensor) -> Tensor:
    """Features of mean zero on the fitted rows, so that the mean target is the intercept."""
    mean = fit_y.mean(dim=0)
    gram = fit_x.T @ fit_x + RIDGE * len(fit_x) * torch.eye(fit_x.shape[1], dtype=fit_x.dtype)
    return mean + x @ torch.linalg.solve(gram, fit_x.T @ (fit_y - mean))


def _mlp(fit_x: Tensor, fit_y: Tensor, x: Tensor, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = nn.Sequential(
            nn.Linear(fit_x.shape[1], MLP_WIDTH),
            nn.GELU(),
            nn.Linear(MLP_WIDTH, MLP_WIDTH),
            nn.GELU(),
            nn.Linear(MLP_WIDTH, fit_y.shape[1]),
        )
    fit_x, fit_y = fit_x.float(), fit_y.float()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=MLP_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MLP_STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(MLP_STEPS):
        rows = torch.randint(len(fit_x), (MLP_BATCH,), generator=generator)
        loss = ((probe(fit_x[rows]) - fit_y[rows]) ** 2).sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted: Tensor = probe(x.float())
    return predicted.double()


def _from_last_token(histories: Histories, half: int) -> np.ndarray:
    """The mean belief after each token, of the first half, for the rows of the second."""
    tokens, beliefs = histories.tokens, histories.beliefs
    means = {token: beliefs[:half][tokens[:half] == token].mean(axis=0) for token in np.unique(tokens[:half]).tolist()}
    everywhere = beliefs[:half].mean(axis=(0, 1))
    return np.stack([means.get(token, everywhere) for token in tokens[half:].reshape(-1).tolist()])
