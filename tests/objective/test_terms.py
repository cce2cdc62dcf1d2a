"""From sums to the loss: weights, names, and independence of how the rows were split."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.errors import UserError
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.masks import masked_sum, next_token_mask
from nextlat_dist.objective.terms import (
    has_targets,
    named_terms,
    number_of_terms,
    term_counts,
    term_groups,
    term_weights,
    terms_text,
    weighted_sum,
)
from tests.kit.jobs import LENGTH, ragged_rows

NEXTLAT = ObjectiveConfig(name="nextlat", horizon=2, lambda_hidden=3.0, lambda_kl=0.5)
MTP = ObjectiveConfig(name="mtp", horizon=2, lambda_hidden=3.0, lambda_kl=0.5, lambda_mtp=4.0)
GPT = ObjectiveConfig(name="next_token", horizon=2, lambda_hidden=3.0, lambda_kl=0.5)


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_by_hand() -> None:
    weights = term_weights(float64(4, 8, 2, 5, 1), NEXTLAT)
    assert weights.dtype == torch.float64
    assert weights.tolist() == [1 / 4, 3 / 2 / 8, 3 / 2 / 2, 0.5 / 2 / 5, 0.5 / 2 / 1]
    assert term_weights(float64(4), GPT).tolist() == [0.25]
    assert term_weights(float64(4, 8, 2), MTP).tolist() == [1 / 4, 4 / 2 / 8, 4 / 2 / 2]
    assert [number_of_terms(objective) for objective in (NEXTLAT, GPT, MTP)] == [5, 1, 3]


def test_the_next_token_term_has_a_lambda() -> None:
    objective = ObjectiveConfig(name="nextlat", horizon=1, lambda_next_token=0.25, lambda_hidden=3.0, lambda_kl=0.5)
    assert term_weights(float64(4, 8, 2), objective).tolist() == [0.25 / 4, 3 / 8, 0.5 / 2]
    terms = named_terms(float64(8, 8, 2), float64(4, 8, 2), objective)
    assert terms == {"loss": 0.25 * 2 + 3 + 0.5, "next_token": 2.0, "hidden": 1.0, "kl": 1.0}


def test_what_is_not_finite_and_weighs_nothing_stays_out_of_the_loss() -> None:
    objective = ObjectiveConfig(name="nextlat", horizon=1, lambda_kl=0.0)
    counts = float64(4, 8, 2)
    terms = named_terms(float64(8, 8, float("nan")), counts, objective)
    assert (terms["loss"], terms["next_token"], terms["hidden"]) == (3.0, 2.0, 1.0)
    assert terms["kl"] != terms["kl"]  # and is not hidden either
    sums = float64(8, 8, float("inf")).requires_grad_()
    loss = weighted_sum(sums, term_weights(counts, objective))
    loss.backward()
    assert sums.grad is not None
    assert (loss.item(), sums.grad.tolist()) == (3.0, [0.25, 0.125, 0.0])
    assert not torch.isfinite(weighted_sum(sums.detach(), float64(1, 1, 1)))  # a weighted one does count


def test_an_empty_term_weighs_nothing() -> None:
    counts = float64(4, 8, 0, 5, 0)
    assert term_weights(counts, NEXTLAT).tolist() == [0.25, 3 / 2 / 8, 0, 0.5 / 2 / 5, 0]
    terms = named_terms(float64(2, 8, 0, 10, 0), counts, NEXTLAT)
    assert terms == {"loss": 0.5 + 1.5 + 0.5, "next_token": 0.5, "hidden": 0.5, "kl": 1.0}
    nothing = dict.fromkeys(("loss", "next_token", "hidden", "kl"))
    assert named_terms(float64(0, 0, 0, 0, 0), float64(0, 0, 0, 0, 0), NEXTLAT) == nothing


def test_without_a_target_there_is_no_loss() -> None:
    """Prompts alone have states to predict, but no token."""
    terms = named_terms(float64(0, 8, 2, 0, 0), float64(0, 4, 2, 0, 0), NEXTLAT)
    assert terms == {"loss": None, "next_token": None, "hidden": 1.5, "kl": None}
    assert terms_text(terms) == "loss null  next_token null  hidden 1.5000  kl null"
    assert [has_targets(float64(*counts)) for counts in ((0, 4), (1, 0))] == [False, True]


def test_named_terms_by_hand() -> None:
    terms = named_terms(float64(8, 8, 8, 10, 4), float64(4, 8, 2, 5, 1), NEXTLAT)
    # next_token 2; hidden (1 + 4) / 2; kl (2 + 4) / 2
    assert terms == {"loss": 2 + 3 * 2.5 + 0.5 * 3, "next_token": 2.0, "hidden": 2.5, "kl": 3.0}
    assert named_terms(float64(8), float64(4), GPT) == {"loss": 2.0, "next_token": 2.0}
    assert named_terms(float64(8, 8, 8), float64(4, 8, 2), MTP) == {"loss": 2 + 4 * 2.5, "next_token": 2.0, "mtp": 2.5}


def _sums(rows: Batch, values: torch.Tensor, objective: ObjectiveConfig) -> torch.Tensor:
    """Term sums of some rows whose position t, row b has the given value in every term; `values` [s, b]."""
    steps = range(1, objective.steps_ahead + 1)
    masks = [group.mask(rows, step) for group in term_groups(objective) for step in steps]
    sums = [masked_sum(values[: mask.shape[0]], mask) for mask in (next_token_mask(rows), *masks)]
    return torch.stack(sums)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    cuts=st.sets(st.integers(1, 7)),
    ranks=st.sampled_from([1, 2, 4]),
    name=st.sampled_from(["nextlat", "mtp"]),
    horizon=st.integers(1, 3),
)
def test_loss_does_not_depend_on_how_rows_are_split(
    seed: int, cuts: set[int], ranks: int, name: Any, horizon: int
) -> None:
    """Any micro-batches on any number of ranks: counts and sums add up, and the mean of means they are not."""
    objective = ObjectiveConfig(name=name, horizon=horizon, lambda_hidden=0.7, lambda_kl=1.3, lambda_mtp=0.9)
    rows = ragged_rows(8, seed=seed)
    values = torch.rand(LENGTH, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = term_counts(rows, objective)
    whole = named_terms(_sums(rows, values, objective), counts, objective)

    added, sums, loss = torch.zeros_like(counts), torch.zeros_like(counts), 0.0
    borders = sorted({0, 8, *cuts, *range(0, 8, 8 // ranks)})
    for first, last in pairwise(borders):
        part = Batch(rows.message[first:last])
        added += term_counts(part, objective)
        mine = _sums(part, values[:, first:last], objective)
        sums += mine
        loss += float(weighted_sum(mine, term_weights(counts, objective)))
    assert torch.equal(added, counts)
    assert named_terms(sums, added, objective) == pytest.approx(whole, rel=1e-12)
    assert loss == pytest.approx(whole["loss"], rel=1e-12)


CHANGING = {"lambda_kl": [[100.0, 0.0], [300.0, 2.0], [500.0, 1.0]], "lambda_next_token": [[0.0, 0.5]]}


@pytest.mark.parametrize(
    ("tokens", "kl"), [(0, 0.0), (100, 0.0), (200, 1.0), (300, 2.0), (400, 1.5), (500, 1.0), (10**9, 1.0)]
)
def test_a_lambda_may_change_over_tokens(tokens: int, kl: float) -> None:
    objective = ObjectiveConfig(name="nextlat", lambda_hidden=3.0, lambda_schedule=CHANGING)
    assert term_weights(float64(1, 1, 1), objective, tokens).tolist() == [0.5, 3.0, kl]
    loss = named_terms(float64(1, 1, 1), float64(1, 1, 1), objective, tokens)["loss"]
    assert loss == pytest.approx(0.5 + 3 + kl)
    assert objective.ever_weighs("lambda_kl")
    never = ObjectiveConfig(name="nextlat", lambda_schedule={"lambda_kl": [[0.0, 0.0]]})
    assert not never.ever_weighs("lambda_kl")


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ({"lambda_mtp": [[0, 1]]}, "lambda_mtp is no weight of objective.name=nextlat, which has lambda_next_token, "),
        ({"lambda_kl": []}, "must give each a list of [tokens, value]"),
        ({"lambda_kl": [[0, 1, 2]]}, "must give each a list of [tokens, value]"),
        ({"lambda_kl": [[0]]}, "must give each a list of [tokens, value]"),
        ({"lambda_kl": [[5, 1], [5, 2]]}, "its tokens rising"),
        ({"lambda_kl": [[0, -1]]}, "its values from 0 to 1e+6"),
        ({"lambda_kl": [[0, 0]], "lambda_hidden": [[0, 0]]}, "has nothing to learn"),
        ({"lambda_kl": 3}, "must be a list"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(points: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        config_from_dict({"objective": {"lambda_schedule": points}})
    assert said in str(caught.value)
