"""The measures of the belief report against cases worked out by hand, and their questions against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nextlat_dist.evaluation.belief import probes as belief_probes
from nextlat_dist.evaluation.belief.controls import Oracle
from nextlat_dist.evaluation.belief.data import (
    OTHER_BELIEF,
    POSSIBLE,
    SAME_BELIEF,
    Histories,
    Pairs,
    counterfactuals,
    find_pairs,
)
from nextlat_dist.evaluation.belief.measures import auc, counterfactual_errors, equivalence, rollouts
from nextlat_dist.evaluation.belief.probes import decodability, r_squared
from nextlat_dist.tasks import FIRST_SYMBOL_ID
from nextlat_dist.tasks.hmm import Hmm


def histories_of(process: str, documents: int = 40, **options: float) -> Histories:
    hmm = Hmm(process=process, **options)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    tokens = np.stack([hmm.sample(rng, "test").tokens for _ in range(documents)])
    return Histories(hmm, tokens, hmm.beliefs(tokens))


class Drifting:
    """States in one dimension: position t has t; p_ψ adds `step`; the head is uniform over four symbols."""

    vocab_size, hidden_size, has_predictor = FIRST_SYMBOL_ID + 4, 1, True

    def __init__(self, step: float) -> None:
        self.step = step

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(tokens.shape[1], dtype=torch.float64).expand(tokens.shape)[..., None]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*states.shape[:-1], self.vocab_size, dtype=torch.float64)

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return states + self.step


def test_auc_counts_pairs_and_ties_half() -> None:
    assert auc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert auc(np.array([3.0]), np.array([1.0, 2.0])) == 0
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert auc(np.ones(5), np.ones(7)) == 0.5


def test_r_squared_by_hand() -> None:
    y = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    assert r_squared(y, y) == 1
    assert r_squared(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), y) == 0
    assert r_squared(torch.tensor([[1.0, 0.0], [2.0, 4.0]]), y) == pytest.approx(1 - 1 / 10)


def test_transition_error_by_hand() -> None:
    """Positions 0 .. 8 have variance 60/9; after i steps of 1.5 the state is i/2 too far."""
    histories = histories_of("mess3", length=8)
    model = Drifting(1.5)
    errors = rollouts(model, model.states(torch.from_numpy(histories.tokens)), histories)["transition_error"]
    assert errors == pytest.approx([i / 2 / math.sqrt(60 / 9) for i in (1, 2, 3, 4)])


def test_kl_by_hand() -> None:
    """Z1R tells its next token but for R. From the prior 1/3 each: P(0) = 1/2. Uniform over 8 ids costs log 8."""
    histories = histories_of("z1r", length=8)
    model = Drifting(1.0)
    found = rollouts(model, model.states(torch.from_numpy(histories.tokens)), histories)
    true = histories.hmm.next_emission(histories.beliefs)
    entropy = -(true * np.log(np.maximum(true, 1e-300))).sum(axis=-1)
    for step in range(1, 5):
        own = entropy[:, step - 1 : step + 4]
        assert found["kl"][step - 1] == pytest.approx(math.log(8) - own.mean())
        assert found["kl_stationary"][step - 1] == pytest.approx(math.log(2) - own.mean())
    assert found["kl_forgetful"][0] == pytest.approx(found["kl_stationary"][0])
    assert found["kl_forgetful"][3] < 0.5 * found["kl_forgetful"][0]


def test_sum_of_kl_is_the_divergence_of_the_joint_future() -> None:
    """Of all futures of three tokens, enumerated, from one history: what the steps add up to in expectation."""
    hmm = Hmm(process="mess3", x=0.05, alpha=0.7, length=6)
    rng = np.random.default_rng(1)
    tokens = np.stack([hmm.sample(rng, "test").tokens for _ in range(6000)])
    histories = Histories(hmm, tokens, hmm.beliefs(tokens))
    model = Drifting(1.0)  # uniform over 8 ids, whatever the state
    found = rollouts(model, model.states(torch.from_numpy(tokens)), histories)["kl"]
    divergence = 0.0
    for start in range(4):  # every start has its history's expectation; the joint one of tokens start + 1 … start + 3
        joint = {(): hmm.prior}
        for _ in range(start + 3):
            joint = {(*w, x): v @ hmm.transitions[x] for w, v in joint.items() for x in range(3)}
        past: dict[tuple[int, ...], float] = {}
        for word, vector in joint.items():
            past[word[:start]] = past.get(word[:start], 0) + float(vector.sum())
        for word, vector in joint.items():
            p = float(vector.sum())
            divergence += p * (math.log(p / past[word[:start]]) + 3 * math.log(8)) / 4
    assert sum(found) == pytest.approx(divergence, rel=0.01)


def test_counterfactuals_take_another_possible_token_after_the_same_history() -> None:
    histories = histories_of("rrxor", length=16)
    other = counterfactuals(histories, 0)
    assert other is not None
    for tokens, cut in zip(other.tokens, other.cuts.tolist(), strict=True):
        row = next(row for row in histories.tokens if (row[: cut + 1] == tokens[: cut + 1]).all())
        belief = histories.hmm.beliefs(tokens[: cut + 1])[-1]
        assert cut + histories.steps <= 16
        assert histories.hmm.next_emission(belief)[tokens[cut + 1] - FIRST_SYMBOL_ID] >= POSSIBLE
        for position in range(cut + 1, cut + 1 + histories.steps):  # what follows is possible too
            following = histories.hmm.next_emission(histories.hmm.beliefs(tokens[:position])[-1])
            assert following[tokens[position] - FIRST_SYMBOL_ID] > 0
        del row
    documents = {tuple(row) for row in histories.tokens.tolist()}
    came = [tuple(tokens[: cut + 2]) for tokens, cut in zip(other.tokens.tolist(), other.cuts.tolist(), strict=True)]
    prefixes = {row[: len(own)] for own in came for row in documents if len(own) > 12}
    assert not prefixes & {
        own for own in came if len(own) > 12
    }  # long histories are of one document: it went elsewhere


def test_a_process_without_choice_has_no_counterfactuals_to_ask_about() -> None:
    """After Z comes 0, after that 1: only at R, and before synchronisation, could another token have come."""
    histories = histories_of("z1r", length=8)
    other = counterfactuals(histories, 0)
    assert other is not None
    hmm = histories.hmm
    following = [hmm.next_emission(hmm.beliefs(t[: c + 1])[-1]) for t, c in zip(*other, strict=True)]
    assert all(probabilities.max() < 1 for probabilities in following)


def test_counterfactual_error_by_hand() -> None:
    histories = histories_of("mess3", length=8)
    other = counterfactuals(histories, 0)
    assert other is not None
    model = Drifting(1.5)
    errors = counterfactual_errors(model, model.states(torch.from_numpy(histories.tokens)), other, 4)
    assert errors == pytest.approx([i / 2 / math.sqrt(60 / 9) for i in (1, 2, 3, 4)])


@pytest.mark.parametrize("process", ["mess3", "rrxor"])
def test_pairs_are_what_they_are_called(process: str) -> None:
    histories = histories_of(process, documents=30)  # all of them are in the pool
    pairs = find_pairs(histories, 0)
    assert pairs is not None
    width = histories.tokens.shape[1]

    def looked_up(index: int) -> tuple[list[int], np.ndarray]:
        row, position = divmod(index, width)
        return histories.tokens[row, : position + 1].tolist(), histories.beliefs[row, position]

    def ending(one: list[int], two: list[int]) -> int:
        shared = 0
        while shared < min(len(one), len(two)) and one[-1 - shared] == two[-1 - shared]:
            shared += 1
        return shared

    endings = {}
    for name, found in pairs._asdict().items():
        read = [(looked_up(a), looked_up(b)) for a, b in found.tolist()]
        apart = [0.5 * np.abs(one[1] - two[1]).sum() for one, two in read]
        assert max(apart) <= SAME_BELIEF + 1e-6 if name == "same" else min(apart) >= OTHER_BELIEF - 1e-6
        assert all(one[0] != two[0] for one, two in read)
        endings[name] = np.mean([ending(one[0], two[0]) for one, two in read])
    assert endings["alike"] > endings["other"] + 0.5

    beliefs = histories.beliefs.reshape(-1, len(histories.hmm.prior))
    for index, partner in pairs.same[::40].tolist():  # of all histories of this belief, none ends less like it
        history = looked_up(index)[0]
        apart = 0.5 * np.abs(beliefs - beliefs[index]).sum(axis=1)
        others = [looked_up(other)[0] for other in np.flatnonzero(apart <= SAME_BELIEF).tolist() if other % width]
        least = min(ending(history, other) for other in others if other != history)
        assert ending(history, looked_up(partner)[0]) == least
    for index, partner in pairs.alike[::40].tolist():  # of those of other beliefs, none ends more like it
        history = looked_up(index)[0]
        apart = 0.5 * np.abs(beliefs - beliefs[index]).sum(axis=1)
        others = [looked_up(other)[0] for other in np.flatnonzero(apart >= OTHER_BELIEF).tolist() if other % width]
        assert ending(history, looked_up(partner)[0]) == max(ending(history, other) for other in others)


def test_equivalence_by_hand() -> None:
    states = torch.tensor([[[0.0], [1.0], [5.0], [6.0]]])
    pairs = Pairs(np.array([[0, 1], [2, 3]]), np.array([[0, 2], [1, 3]]), np.array([[0, 1], [0, 3]]))
    found = equivalence(states, pairs)
    assert found["equivalence_auc_random"] == 1
    assert found["equivalence_auc"] == pytest.approx(0.75)  # one of two, and a tie
    assert found["equivalence_ratio"] == pytest.approx(1 / 5)


def test_too_few_histories_give_no_pairs() -> None:
    assert find_pairs(histories_of("even", documents=2, length=4), 0) is None


def test_probes_read_what_is_there_and_nothing_else() -> None:
    """A belief that is a square of the feature: nothing for the linear probe, all of it for the MLP."""
    rng = np.random.default_rng(0)
    histories = histories_of("mess3", documents=60, length=31)
    feature = rng.uniform(-1, 1, size=(60, 32))
    squared = Histories(histories.hmm, histories.tokens, np.stack([feature**2, 1 - feature**2], axis=-1))
    found = decodability(torch.from_numpy(feature)[..., None], squared, seed=0)
    assert abs(found["linear_r2"]) < 0.05
    assert found["mlp_r2"] > 0.95
    assert max(found["mlp_r2_shuffled"], found["linear_r2_shuffled"]) < 0.05
    # the last token is the whole belief of a process that emits its state
    emitted = (histories.tokens[..., None] == np.arange(FIRST_SYMBOL_ID, FIRST_SYMBOL_ID + 3)).astype(float)
    told = Histories(histories.hmm, histories.tokens, emitted)
    assert decodability(torch.from_numpy(feature)[..., None], told, seed=0)["last_token_r2"] == pytest.approx(1)


def test_probes_are_judged_where_they_were_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature and last token tell the belief in the first half of the documents; in the second they tell the contrary:
    each prediction is off by one, R² = 1 - 1 / (p (1 - p)).
    """
    monkeypatch.setattr(belief_probes, "MLP_STEPS", 60)
    histories = histories_of("mess3", documents=60, length=31)
    shown = histories.tokens == FIRST_SYMBOL_ID
    told = shown ^ (np.arange(60) >= 30)[:, None]
    contrary = Histories(histories.hmm, histories.tokens, np.stack([told, ~told], axis=-1).astype(float))
    found = decodability(torch.from_numpy(shown)[..., None].double(), contrary, seed=0)
    p = told[30:].mean()
    for name in ("linear_r2", "mlp_r2", "last_token_r2"):
        assert found[name] == pytest.approx(1 - 1 / (p * (1 - p)), rel=0.05)


def test_the_oracle_is_exact() -> None:
    histories = histories_of("random", length=12)
    oracle = Oracle(histories.hmm)
    tokens = torch.from_numpy(histories.tokens)
    states = oracle.states(tokens)
    assert np.allclose(oracle.logits(states).softmax(dim=-1)[..., :FIRST_SYMBOL_ID], 0, atol=1e-10)
    assert np.allclose(oracle.advance(states[:, :-1], tokens[:, 1:]), states[:, 1:])
