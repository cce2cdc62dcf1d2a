"""Logistic regression of a yes/no outcome, and how well its probabilities hold (reliability).

Newton's method with a ridge that is too light to matter where there are data, and keeps the weights finite where the
outcomes can be separated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RIDGE = 1e-2  # of half the squared weights, against a sum over all observations
MOST_STEPS = 100
TOLERANCE = 1e-9


def probability(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """P(yes) [n] of features [n, k] with weights [k]."""
    return 0.5 * (1 + np.tanh(0.5 * (features @ weights)))


def fit(features: np.ndarray, outcomes: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The weights [k] of largest penalised likelihood, for features [n, k] (a column of ones among them) and outcomes
    [n] of 0 or 1.
    """
    weights = np.zeros(features.shape[1])
    for _ in range(MOST_STEPS):
        p = probability(weights, features)
        gradient = features.T @ (p - outcomes) + ridge * weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + ridge * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if np.abs(step).max() < TOLERANCE:
            break
    return weights


def reliability(predicted: np.ndarray, outcomes: np.ndarray, bins: int) -> list[dict[str, Any]]:
    """Predicted against observed share in up to `bins` groups of equal size, from the least to the most probable."""
    order = np.argsort(predicted, kind="stable")
    return [
        {"predicted": float(predicted[part].mean()), "observed": float(outcomes[part].mean()), "count": len(part)}
        for part in np.array_split(order, bins)
        if len(part)
    ]
