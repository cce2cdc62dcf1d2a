from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextlat_dist.data.mixture import Mixture
from nextlat_dist.errors import UserError

WEIGHTS = st.one_of(st.integers(0, 1000), st.sampled_from([0.001, 0.1, 0.3333, 1e-4, 2.5]))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[tuple[int, list[float]]], int]:
    """(phases as (row, weights), rows to take)"""
    sources = draw(st.integers(1, 7))
    begins = [0, *sorted(draw(st.sets(st.integers(1, 250), max_size=3)))]
    rows = st.lists(WEIGHTS, min_size=sources, max_size=sources).filter(any)
    return [(begin, draw(rows)) for begin in begins], draw(st.integers(1, 400))


def build(phases: list[tuple[int, list[float]]]) -> Mixture:
    named = [(begin, {f"s{number}": weight for number, weight in enumerate(weights)}) for begin, weights in phases]
    return Mixture(named[0][1], named[1:])


def exact_target(phases: list[tuple[int, list[float]]], rows: int) -> list[Fraction]:
    """Rows due from each source, row by row in exact fractions."""
    due = [Fraction(0)] * len(phases[0][1])
    for row in range(rows):
        weights = [Fraction(str(w)) for w in next(w for begin, w in reversed(phases) if begin <= row)]
        due = [total + weight / sum(weights) for total, weight in zip(due, weights, strict=True)]
    return due


@given(mixtures())
def test_every_prefix_is_within_one_row_of_its_target(case: tuple[list[tuple[int, list[float]]], int]) -> None:
    """The bound of Tijdeman's theorem, which is below one, at every prefix and over every change of weights."""
    phases, rows = case
    mixture, count = build(phases), len(phases[0][1])
    chosen = mixture.start().take(rows)
    taken = [0] * count
    bound = 1 - Fraction(1, max(2 * count - 2, 1)) if count > 1 else 0
    due = [Fraction(0)] * count
    for row, source in enumerate(chosen.tolist()):
        taken[source] += 1
        weights = [Fraction(str(w)) for w in next(w for begin, w in reversed(phases) if begin <= row)]
        due = [total + weight / sum(weights) for total, weight in zip(due, weights, strict=True)]
        assert max(abs(have - want) for have, want in zip(taken, due, strict=True)) <= bound
    assert mixture.target(rows) == pytest.approx([float(share) for share in exact_target(phases, rows)])


@given(mixtures(), st.integers(0, 400))
def test_going_on_is_the_same_as_never_stopping(case: tuple[list[tuple[int, list[float]]], int], cut: int) -> None:
    phases, rows = case
    mixture = build(phases)
    whole = mixture.start().take(cut + rows)
    state = mixture.start()
    np.testing.assert_array_equal(state.take(cut), whole[:cut])
    for resumed in (mixture.start(cut, state.taken), mixture.start(cut), state):
        np.testing.assert_array_equal(resumed.take(rows), whole[cut:])


def test_taking_what_lags_most_would_break_the_bound() -> None:
    """Why the rule is not the simpler one: with these weights that one is off by more than a row."""
    weights = [729, 42875, 2744, 216, 42875, 15625]
    total, worst = sum(weights), 0
    taken, due = np.zeros(6, np.int64), np.zeros(6, np.int64)
    for _ in range(300):
        due += weights
        taken[int((due - taken * total).argmax())] += 1
        worst = max(worst, int(np.abs(due - taken * total).max()))
    assert worst > total


def test_a_source_without_weight_is_never_taken_and_may_come_later() -> None:
    mixture = Mixture({"web": 1, "code": 0}, [(10, {"web": 0.25, "code": 0.75})])
    chosen = mixture.start().take(50)
    assert not chosen[:10].any()
    assert chosen[10:].sum() == 30
    assert mixture.shares(9) == [1, 0]
    assert mixture.shares(10) == [0.25, 0.75]


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"a": -1, "b": 2}, [], "weight of source a is -1"),
        ({"a": float("nan"), "b": 2}, [], "weight of source a is nan"),
        ({"a": 0, "b": 0}, [], "are all 0"),
        ({"a": 1, "b": 1}, [(5, {"a": 1})], "give one for each of a, b"),
        ({"a": 1, "b": 1}, [(5, {"a": 1, "b": 1}), (5, {"a": 1, "b": 2})], "row 5 after row 5"),
    ],
)
def test_weights_that_make_no_mixture(weights: dict, changes: list, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        Mixture(weights, changes)
