"""The questions of the belief report to every model: documents, pairs and counterfactuals, drawn once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextlat_dist.evaluation.belief import measures
from nextlat_dist.evaluation.belief.data import Histories, counterfactuals, find_pairs
from nextlat_dist.evaluation.belief.probes import decodability
from nextlat_dist.evaluation.belief.rows import BeliefRow, Predictor, StateNumbers, TransitionNumbers
from nextlat_dist.evaluation.effective_rank import effective_rank
from nextlat_dist.inference.state_model import StateModel


class Questions:
    """The questions about some documents; `seed` is that of pairs, counterfactuals and probes."""

    def __init__(self, histories: Histories, seed: int) -> None:
        self.histories, self.seed = histories, seed
        self.pairs = find_pairs(histories, seed)
        self.counterfactuals = counterfactuals(histories, seed)
        self.tokens = torch.from_numpy(histories.tokens)

    def about_states(self, states: Tensor) -> StateNumbers:
        """Decodability, equivalence and effective rank: what needs no p_ψ."""
        found: dict[str, Any] = {**decodability(states, self.histories, self.seed)}
        found |= dict.fromkeys(measures.EQUIVALENCE)
        if self.pairs is not None:
            found |= measures.equivalence(states, self.pairs)
        return StateNumbers(**found, effective_rank=effective_rank(states.reshape(-1, states.shape[-1])))

    def about_transitions(self, model: StateModel, states: Tensor) -> TransitionNumbers:
        """Sufficiency and transitions: by step, at the first one, and the worst."""
        rolled = measures.rollouts(model, states, self.histories)
        stationary = np.array(rolled["kl_stationary"])
        ratio = (np.array(rolled["kl"]) / stationary).tolist()
        other = None
        if self.counterfactuals is not None:
            other = measures.counterfactual_errors(model, states, self.counterfactuals, self.histories.steps)
        return TransitionNumbers(
            kl=rolled["kl"],
            kl_joint=sum(rolled["kl"]),
            kl_ratio=ratio,
            first_kl_ratio=ratio[0],
            worst_kl_ratio=max(ratio),
            forgetful_ratio=(np.array(rolled["kl_forgetful"]) / stationary).tolist(),
            transition_error=rolled["transition_error"],
            first_transition_error=rolled["transition_error"][0],
            counterfactual_error=other,
            first_counterfactual_error=None if other is None else other[0],
            worst_transition_error=max(rolled["transition_error"] + (other or [])),
        )

    def row(self, model: StateModel, name: str, run: int, predictor: Predictor) -> BeliefRow:
        """All of it about one model."""
        states = model.states(self.tokens)
        return BeliefRow.of(name, run, predictor, self.about_states(states), self.about_transitions(model, states))
