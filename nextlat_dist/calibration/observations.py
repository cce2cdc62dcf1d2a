"""Outcomes of drafted tokens, and the acceptance they show: shares by position, and a regression on confidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nextlat_dist.calibration.logistic import fit, probability, reliability
from nextlat_dist.inference.generation import Cycle
from nextlat_dist.inference.speculative.calibration import CONFIDENCE_LIMIT, Acceptance

FEWEST_OBSERVATIONS = 20  # of a position with a share of its own
RELIABILITY_BINS = 8


@dataclass
class Observations:
    """Drafted tokens of one temperature whose predecessors were all accepted."""

    positions: list[int] = field(default_factory=list)  # 1, 2, …
    confidences: list[float] = field(default_factory=list)
    accepted: list[bool] = field(default_factory=list)

    def note(self, cycle: Cycle) -> None:
        for confidences, kept in zip(cycle.confidences, cycle.accepted, strict=True):
            for position, confidence in enumerate(confidences[: kept + 1], start=1):
                self.positions.append(position)
                self.confidences.append(confidence)
                self.accepted.append(position <= kept)

    def features(self) -> np.ndarray:
        """1, logit(confidence), log(position): [observations, 3]."""
        confidence = np.clip(np.array(self.confidences), CONFIDENCE_LIMIT, 1 - CONFIDENCE_LIMIT)
        positions = np.array(self.positions, dtype=np.float64)
        return np.stack([np.ones_like(positions), np.log(confidence / (1 - confidence)), np.log(positions)], axis=1)

    def acceptance(self, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Acceptance:
        """The shares by position, up to the first that was hardly ever reached, and the regression on confidence."""
        positions, accepted = np.array(self.positions), np.array(self.accepted, dtype=np.float64)
        by_position: list[float] = []
        for position in range(1, positions.max() + 1):
            here = positions == position
            if position > 1 and here.sum() < FEWEST_OBSERVATIONS:
                break
            by_position.append(float(accepted[here].mean()))
        return Acceptance(temperature, by_position, fit(self.features(), accepted).tolist(), top_k, top_p)

    def reliability(self, acceptance: Acceptance) -> list[dict[str, Any]]:
        predicted = probability(np.array(acceptance.confidence), self.features())
        return reliability(predicted, np.array(self.accepted, dtype=np.float64), RELIABILITY_BINS)
