"""Three properties of a belief state, measured: sufficiency, equivalence, consistent transitions.

    rollouts(model, states, histories) -> dict[str, list[float]]
    counterfactual_errors(model, states, other, steps) -> list[float]
    equivalence(states, pairs) -> dict[str, float]

**Sufficiency.** From h_t alone, p_ψ and the head give a distribution of the whole future, Q(x_{t+1} … x_{t+k}) =
Π_i softmax(head(ĥ_{t+i-1}))[x_{t+i}], with ĥ_t = h_t and ĥ_{t+i} = p_ψ(ĥ_{t+i-1}, x_{t+i}). By the chain rule its
divergence from the true distribution P given the history is KL(P ‖ Q) = Σ_i E_P KL(P(x_{t+i} | b_{t+i-1}) ‖ Q(x_{t+i} |
…)): the inner divergence is computed exactly from the exact belief, the expectation over paths is the mean over what
followed in the documents, which are samples of P. So `kl[i]` is unbiased, and the sum over steps is the divergence of
the joint future (which bounds that of x_{t+k} alone from above). In nats.

**Transitions.** Root mean square of ‖ĥ_{t+i} - h_{t+i}‖ over that of ‖h - mean h‖: 0 is exact, 1 is no better than the
mean state, √2 is a state of another history.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nextlat_dist.evaluation.belief.data import Counterfactuals, Histories, Pairs
from nextlat_dist.inference.state_model import StateModel
from nextlat_dist.tasks import FIRST_SYMBOL_ID

ROUNDING = 1e-6  # of states in fp32, relative to their length: 8 times the distance of 1 to the next number
EQUIVALENCE = ("equivalence_auc", "equivalence_auc_random", "equivalence_ratio")  # what `equivalence` returns


def rollouts(model: StateModel, states: Tensor, histories: Histories) -> dict[str, list[float]]:
    """Rolled out from every position that `steps` more tokens follow, along those tokens.

    Args:
        states: [n, length + 1, hidden] of the histories.

    Returns:
        Per step i = 1 .. steps: `kl` of x_{t+i}; `kl_stationary`, that of a distribution that knows no history;
        `kl_forgetful`, that of exact Bayes that starts at t without knowing anything; `transition_error` of ĥ_{t+i}.
    """
    hmm, steps = histories.hmm, histories.steps
    starts = histories.tokens.shape[1] - steps  # positions 0 .. length - steps
    tokens = torch.from_numpy(histories.tokens).to(states.device)
    true = hmm.next_emission(histories.beliefs)  # float64 [n, length + 1, emissions]
    stationary = np.broadcast_to(hmm.next_emission(hmm.prior), true[:, :starts].shape)
    forgetful = np.broadcast_to(hmm.prior, histories.beliefs[:, :starts].shape)
    spread = _spread(states)
    h = states[:, :starts]
    found: dict[str, list[float]] = {"kl": [], "kl_stationary": [], "kl_forgetful": [], "transition_error": []}
    for step in range(1, steps + 1):
        here = true[:, step - 1 : step - 1 + starts]
        found["kl"].append(_divergence(here, _log_probabilities(model, h)))
        found["kl_stationary"].append(_divergence(here, np.log(stationary)))
        found["kl_forgetful"].append(_divergence(here, _log(hmm.next_emission(forgetful))))
        came = histories.tokens[:, step : step + starts]
        forgetful = hmm.update(forgetful, came - FIRST_SYMBOL_ID)
        h = model.advance(h, tokens[:, step : step + starts])
        found["transition_error"].append(_relative(_distance(h, states[:, step : step + starts]), spread))
    return found


def counterfactual_errors(model: StateModel, states: Tensor, other: Counterfactuals, steps: int) -> list[float]:
    """The transition error per step along other tokens than those of the documents; `states` set the spread.

    The target is what the model makes of the counterfactual history itself.
    """
    spread = _spread(states)
    tokens, cuts = torch.from_numpy(other.tokens), torch.from_numpy(other.cuts)
    truth = model.states(tokens)
    tokens, cuts = tokens.to(truth.device), cuts.to(truth.device)
    rows = torch.arange(len(cuts), device=truth.device)
    h = truth[rows, cuts]
    errors = []
    for step in range(1, steps + 1):
        h = model.advance(h, tokens[rows, cuts + step])
        errors.append(_relative(_distance(h, truth[rows, cuts + step]), spread))
    return errors


def equivalence(states: Tensor, pairs: Pairs) -> dict[str, float]:
    """Do equal beliefs have equal states?

    Returns:
        `equivalence_auc`: the chance that two histories of equal belief (whose last tokens are as unlike as can be) are
        nearer to each other than two of different belief whose last tokens are as alike as can be; 0.5 is none at all.
        `equivalence_auc_random`: the same against different beliefs drawn at random. `equivalence_ratio`: mean distance
        at equal belief over that at random different belief.
    """
    flat = states.double().reshape(-1, states.shape[-1]).cpu()
    same, other, alike = ((flat[p[:, 0]] - flat[p[:, 1]]).norm(dim=1).numpy() for p in map(torch.from_numpy, pairs))
    return {
        "equivalence_auc": auc(same, alike),
        "equivalence_auc_random": auc(same, other),
        "equivalence_ratio": _relative(float(same.mean()), float(other.mean())),
    }


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """P(a random one of `low` < a random one of `high`), ties half."""
    ordered = np.sort(high)
    below, up_to = np.searchsorted(ordered, low, side="left"), np.searchsorted(ordered, low, side="right")
    return float((len(high) - (below + up_to) / 2).mean() / len(high))


def _log_probabilities(model: StateModel, h: Tensor) -> np.ndarray:
    """Of the emissions, normalised over the whole vocabulary: probability that goes elsewhere is lost."""
    return model.logits(h).double().log_softmax(dim=-1)[..., FIRST_SYMBOL_ID:].cpu().numpy()


def _divergence(true: np.ndarray, log_other: np.ndarray) -> float:
    """Mean of KL(true ‖ other) over [..., emissions]; the other may have further columns."""
    return float((true * (_log(true) - log_other[..., : true.shape[-1]])).sum(axis=-1).mean())


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))


def _distance(h: Tensor, target: Tensor) -> float:
    return float((h - target).double().square().sum(dim=-1).mean().sqrt())


def _spread(states: Tensor) -> float:
    """Root mean square distance to the mean state; 0 where it is rounding (`ROUNDING`), not difference."""
    flat = states.double().reshape(-1, states.shape[-1])
    spread = float((flat - flat.mean(dim=0)).square().sum(dim=-1).mean().sqrt())
    size = float(flat.square().sum(dim=-1).mean().sqrt())
    return spread if spread > ROUNDING * size else 0.0


def _relative(distance: float, spread: float) -> float:
    """Where all states are one, each is as far off as the mean state: 1."""
    return distance / spread if spread > 0 else 1.0
