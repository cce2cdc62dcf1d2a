"""Hidden Markov processes: beliefs against hand-computed Bayes, distributions against enumeration."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.tasks import BOS_ID, FIRST_SYMBOL_ID, make_task
from nextlat_dist.tasks.hmm import OPTIONS, Hmm


def ids(*emitted: int) -> np.ndarray:
    return np.array([BOS_ID, *(FIRST_SYMBOL_ID + x for x in emitted)])


@pytest.mark.parametrize("process", OPTIONS)
def test_rows_are_stochastic_and_the_prior_is_stationary(process: str) -> None:
    hmm = Hmm(process=process)
    total = hmm.transitions.sum(axis=0)
    assert np.allclose(total.sum(axis=1), 1)
    assert np.allclose(hmm.prior @ total, hmm.prior, atol=1e-12)
    assert hmm.prior.sum() == pytest.approx(1)


def test_mess3_is_the_published_matrix() -> None:
    """T(A) of Shai et al. 2024 (arXiv 2405.15943) at x = 0.05, α = 0.85: β = 0.075, y = 0.9."""
    expected = [[0.765, 0.00375, 0.00375], [0.0425, 0.0675, 0.00375], [0.0425, 0.00375, 0.0675]]
    assert np.allclose(Hmm(process="mess3", x=0.05, alpha=0.85).transitions[0], expected)


def test_beliefs_of_z1r_by_hand() -> None:
    """A 0 first: from Z (1/3 · 1) on to O, or from R (1/3 · 1/2) back to Z. A 1 then can only come from O."""
    beliefs = Hmm(process="z1r").beliefs(ids(0, 1))
    assert np.allclose(beliefs[0], [1 / 3, 1 / 3, 1 / 3])
    assert np.allclose(beliefs[1], [1 / 3, 2 / 3, 0])
    assert np.allclose(beliefs[2], [0, 0, 1])


def test_rrxor_emits_the_xor_of_its_two_random_bits() -> None:
    hmm = Hmm(process="rrxor")
    emitted = np.array(hmm.emit(np.random.default_rng(0), 0, 300)).reshape(-1, 3)
    assert (emitted[:, 0] ^ emitted[:, 1] == emitted[:, 2]).all()
    assert 30 < emitted[:, 0].sum() < 70
    assert 30 < emitted[:, 1].sum() < 70


def test_runs_of_ones_of_the_even_process_are_even() -> None:
    emitted = "".join(map(str, Hmm(process="even").emit(np.random.default_rng(0), 0, 500)))
    runs = [len(run) for run in emitted.split("0")[1:-1]]
    assert {run % 2 for run in runs} == {0}
    assert max(runs) >= 4


@pytest.mark.parametrize("process", ["mess3", "random", "rrxor"])
def test_beliefs_give_the_law_of_the_future(process: str) -> None:
    """Probabilities of whole words, from the matrices alone, against what beliefs say step by step."""
    hmm = Hmm(process=process)
    history = tuple(hmm.emit(np.random.default_rng(1), 0, 3))
    belief = hmm.beliefs(ids(*history))[-1]

    def word(emitted: tuple[int, ...]) -> float:
        state = hmm.prior
        for x in emitted:
            state = state @ hmm.transitions[x]
        return float(state.sum())

    alphabet = range(len(hmm.transitions))
    for steps in (1, 2, 3):
        distribution = np.zeros(len(hmm.transitions))
        for future in itertools.product(alphabet, repeat=steps):
            distribution[future[-1]] += word(history + future) / word(history)
        assert np.allclose(hmm.next_emission(belief, steps), distribution)
    for x in alphabet:
        if word((*history, x)) > 0:
            assert np.allclose(hmm.update(belief, np.array(x)), hmm.beliefs(ids(*history, x))[-1])


def test_beliefs_of_many_documents_are_those_of_each() -> None:
    hmm = Hmm(process="random", length=9)
    rng = np.random.default_rng(2)
    documents = [hmm.sample(rng, "train") for _ in range(5)]
    together = hmm.beliefs(np.stack([document.tokens for document in documents]))
    assert together.shape == (5, 10, 4)
    for document, beliefs in zip(documents, together, strict=True):
        assert np.allclose(document.beliefs, beliefs, atol=1e-6)


def test_an_impossible_token_brings_the_prior_back() -> None:
    hmm = Hmm(process="z1r")
    assert np.allclose(hmm.update(np.array([1.0, 0, 0]), np.array(1)), hmm.prior)


class AlmostOne:
    """A generator that draws the largest number below 1."""

    def random(self, size: int) -> np.ndarray:
        return np.full(size, np.nextafter(1, 0))


@pytest.mark.parametrize(
    "options", [{"process": name} for name in OPTIONS] + [{"process": "random", "process_seed": n} for n in range(20)]
)
def test_rounding_makes_nothing_possible_that_is_not(options: dict[str, Any]) -> None:
    """Probabilities add up to 1 to rounding only: what is drawn there is the last that may come."""
    hmm = Hmm(**options)
    for state in range(len(hmm.prior)):
        (emitted,) = hmm.emit(AlmostOne(), state, 1)  # type: ignore[arg-type]
        assert hmm.emission[state, emitted] > 0


@pytest.mark.parametrize("process", OPTIONS)
def test_documents_are_as_frequent_as_the_process_says(process: str) -> None:
    """Frequencies of the first two tokens of 1,000 documents, within five standard deviations."""
    hmm = Hmm(process=process, length=2)
    rng = np.random.default_rng(3)
    drawn = [tuple(hmm.sample(rng, "train").tokens[1:] - FIRST_SYMBOL_ID) for _ in range(1000)]
    for word in itertools.product(range(len(hmm.transitions)), repeat=2):
        expected = float((hmm.prior @ hmm.transitions[word[0]] @ hmm.transitions[word[1]]).sum())
        share = sum(own == word for own in drawn) / len(drawn)
        assert abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(drawn))


def test_a_document_is_a_plain_one_of_bos_and_its_tokens() -> None:
    hmm = Hmm(process="mess3", length=7)
    document = hmm.sample(np.random.default_rng(4), "test")
    assert document.tokens[0] == BOS_ID
    assert len(document.tokens) == 8
    assert document.prompt_tokens == 1
    assert document.labels is None
    assert document.beliefs is not None
    assert document.beliefs.dtype == np.float32
    again = hmm.sample(np.random.default_rng(4), "test")
    assert again.content == document.content
    assert len({hmm.sample(np.random.default_rng(seed), "test").content for seed in range(20)}) > 15


@pytest.mark.parametrize("process", OPTIONS)
def test_parameters_survive_json_and_make_the_same_world(process: str) -> None:
    hmm = Hmm(process=process, length=5)
    again = make_task("hmm", json.loads(json.dumps(hmm.parameters)))
    assert isinstance(again, Hmm)
    assert again == hmm
    assert np.array_equal(again.transitions, hmm.transitions)
    assert len(again.symbols) == len(hmm.transitions)


def test_another_process_seed_is_another_process() -> None:
    assert not np.allclose(Hmm(process="random").transitions, Hmm(process="random", process_seed=1).transitions)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"process": "mess4"}, "mess4"),
        ({"length": 0}, "--length 0"),
        ({"process": "z1r", "states": 5}, "--states 5"),
        ({"process": "random", "x": 0.1}, "--x 0.1"),
        ({"x": 0.5}, "--x 0.5"),
        ({"alpha": 1.0}, "--alpha 1.0"),
        ({"process": "random", "states": 1}, "--states 1"),
    ],
)
def test_options_that_make_no_process_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Hmm(**options)  # type: ignore[arg-type]
