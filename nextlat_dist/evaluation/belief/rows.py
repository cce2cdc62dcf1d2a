"""The record of one model in the belief report: what was measured of its states, and of what its p_ψ makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

Predictor = Literal["own", "fitted", "exact"]  # whose p_ψ: the model's own, one fitted afterwards, Bayes' rule
OWN: Predictor = "own"
FITTED: Predictor = "fitted"
EXACT: Predictor = "exact"


@dataclass(frozen=True)
class StateNumbers:
    """What needs no p_ψ; R² as in `belief.probes`, equivalence as in `belief.measures` (None: too few pairs)."""

    linear_r2: float
    mlp_r2: float
    linear_r2_shuffled: float
    mlp_r2_shuffled: float
    last_token_r2: float
    equivalence_auc: float | None
    equivalence_auc_random: float | None
    equivalence_ratio: float | None
    effective_rank: float


@dataclass(frozen=True)
class TransitionNumbers:
    """What a rollout with p_ψ gives, by step where it is a list, with the first and the worst step.

    Attributes:
        kl: of the next token's distribution, in nats; `kl_joint` is its sum over the steps.
        kl_ratio: `kl` as a share of that of a distribution that knows no history.
        forgetful_ratio: the same share for exact Bayes that starts at the state without knowing anything.
        transition_error: along the tokens that came.
        counterfactual_error: along others; None where no other token was possible.
    """

    kl: list[float]
    kl_joint: float
    kl_ratio: list[float]
    first_kl_ratio: float
    worst_kl_ratio: float
    forgetful_ratio: list[float]
    transition_error: list[float]
    first_transition_error: float
    counterfactual_error: list[float] | None
    first_counterfactual_error: float | None
    worst_transition_error: float


@dataclass(frozen=True)
class _Subject:
    """Attributes:
    model: name of the exports that are its runs.
    run: which of them, from 0.
    predictor: whose p_ψ.
    """

    model: str
    run: int
    predictor: Predictor


@dataclass(frozen=True)
class BeliefRow(TransitionNumbers, StateNumbers, _Subject):
    """One run of one model with one p_ψ."""

    @staticmethod
    def of(
        model: str, run: int, predictor: Predictor, states: StateNumbers, transitions: TransitionNumbers
    ) -> BeliefRow:
        return BeliefRow(model, run, predictor, **vars(states), **vars(transitions))


NUMBERS = [
    field.name
    for numbers in (StateNumbers, TransitionNumbers)
    for field in fields(numbers)
    if field.type in ("float", "float | None")
]


def grouped(rows: Sequence[BeliefRow]) -> dict[tuple[str, Predictor], list[BeliefRow]]:
    """Rows by model and kind of p_ψ, in order; a model's own p_ψ comes first."""
    groups: dict[tuple[str, Predictor], list[BeliefRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.predictor), []).append(row)
    return groups


def judged(rows: Sequence[BeliefRow]) -> dict[str, list[BeliefRow]]:
    """The rows that the verdicts are about, by model: with its own p_ψ where it has one."""
    found: dict[str, list[BeliefRow]] = {}
    for (name, _), own in grouped(rows).items():
        found.setdefault(name, own)
    return found
