"""`objective.semantics: release`: its documents and masks by hand and in plain loops, its loss in plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.errors import UserError
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.masks import next_token_mask, state_mask, token_mask
from nextlat_dist.objective.terms import term_counts
from tests.kit import jobs
from tests.kit.harness import Ranks

# position j        0  1  2  3  4  5  6  7  8   and the last one, 9, which is only ever a target
DOCUMENTS = [[0, 0, 0, 0, 1, 1, 2, 2, -1, -1]]
#   a prompt of two, documents without a prompt
LOSS = [[0, 0, 1, 1, 0, 1, 0, 1, 0, 0]]


def by_hand() -> Batch:
    return Batch.of(torch.arange(10)[None], torch.tensor(DOCUMENTS), torch.tensor(LOSS), first_row=7).as_released()


def marks(mask: torch.Tensor) -> str:
    """The mask of the only row, one character per position."""
    return "".join("x" if value else "." for value in mask[:, 0].tolist())


def test_an_end_opens_the_next_document() -> None:
    batch = by_hand()
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 3, -1, -1]]
    assert batch.loss_mask.long().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]]
    assert (batch.released, batch.width, batch.row_numbers.tolist(), len(batch)) == (True, 10, [7], 1)
    assert batch.tokens.tolist() == batch.labels.tolist() == [list(range(10))]
    assert [part.released for part in batch.split(1)] == [True]
    assert not Batch.of(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4)).released


def test_masks_by_hand() -> None:
    """Ends are predicted and nothing is fed them; after them a rollout goes on."""
    batch = by_hand()
    assert marks(next_token_mask(batch)) == ".xxxxxx.."
    assert [marks(state_mask(batch, step)) for step in (1, 2, 3)] == ["xx.x.x..", "x.x.x..", ".x.x.."]
    assert [marks(token_mask(batch, step)) for step in (1, 2, 3)] == ["xx.x.x..", "x.x.x..", ".x.x.."]


@pytest.mark.parametrize("seed", range(20))
def test_masks_in_loops(seed: int) -> None:
    rows = jobs.ragged_rows(3, seed=seed)
    batch, s = rows.as_released(), jobs.LENGTH
    for row in range(3):
        documents, loss = rows.document_ids[row].tolist(), rows.loss_mask[row].tolist()
        ends = [0 <= documents[j] != documents[j + 1] for j in range(s)] + [False]

        def wanted(j: int, documents: Any = documents, loss: Any = loss, ends: Any = ends) -> bool:
            """x_j is to be predicted."""
            opened = 0 < j < s and ends[j - 1] and documents[j] == documents[j + 1] and loss[j + 1]
            return documents[j] >= 0 and (loss[j] or bool(opened))

        real = [number >= 0 for number in documents]
        expected = [real[t] and wanted(t + 1) for t in range(s)]
        assert next_token_mask(batch)[:, row].tolist() == expected
        for step in (1, 2, 5):
            alive = [real[t] and real[t + step] and not ends[t + step] for t in range(s - step)]
            assert state_mask(batch, step)[:, row].tolist() == alive
            both = [alive[t] and expected[t + step] for t in range(s - step)]
            assert token_mask(batch, step)[:, row].tolist() == both


def test_micro_batches_are_counted() -> None:
    objective = ObjectiveConfig(horizon=2, semantics="release")
    rows = jobs.ragged_rows(6, seed=1)
    nothing = Batch.of(rows.tokens[:2], torch.full_like(rows.document_ids[:2], -1), torch.zeros(2, jobs.LENGTH + 1))
    batch = Batch(torch.cat([rows.as_released().message, nothing.as_released().message]))
    assert term_counts(batch, objective, 2).tolist() == [3.0] * 5
    assert term_counts(batch, objective, 1).tolist() == [6.0] * 5
    assert term_counts(batch, objective).tolist() == [1.0] * 5


def losses(raw: dict[str, Any]) -> dict[str, float]:
    """Of two micro-batches, against the mean of their means, float64: relative errors of the loss and its gradient."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import position_counts, term_groups, term_weights, weighted_sum
    from nextlat_dist.training.engine.step_terms import StepTerms

    config, dims = jobs.set_up(raw)
    objective = config.objective
    stack = LayerStack(layer_list(config, dims, torch.float64))
    initialize(stack, config, dims)
    parameters = [parameter for _, parameter in canonical_parameters(stack)]
    batch = jobs.ragged_rows(4, seed=3).as_released()
    weights = term_weights(term_counts(batch, objective, 2), objective)

    expected: Any = 0
    lambdas = [objective.lambda_next_token]
    for group in term_groups(objective):
        lambdas += [group.factor / objective.steps_ahead] * objective.steps_ahead
    stack.layers[-1]._means = None  # its sums, as in the paper
    for part in batch.split(2):
        means = stack(part.message) / position_counts(part, objective)
        expected = expected + sum(weight * mean for weight, mean in zip(lambdas, means, strict=True)) / 2
    wanted = torch.autograd.grad(expected, parameters)
    stack.layers[-1]._means = objective

    found = {}
    for kind in ("whole", "fused"):
        set_term_weights(stack, weights if kind == "fused" else None)
        terms = StepTerms()
        loss = sum(terms(stack(part.message), weights) for part in batch.split(2))
        gradients = torch.autograd.grad(loss, parameters)
        error = max(float((one - two).norm() / two.norm()) for one, two in zip(gradients, wanted, strict=True))
        logged = weighted_sum(terms.take(len(weights), torch.device("cpu")), weights)
        found[kind] = max(error, *(abs(float(value / expected) - 1) for value in (loss, logged)))
    return found


@pytest.mark.parametrize("objective", [{"horizon": 2}, {"name": "next_token"}, {"name": "mtp"}], ids=str)
def test_the_loss_is_the_mean_of_means(objective: dict[str, Any], one_rank: Ranks) -> None:
    raw = jobs.tiny_config(objective={"lambda_mtp": 0.7, **objective, "semantics": "release"})
    (found,) = one_rank.run(losses, raw)
    assert max(found.values()) < 1e-12


@pytest.mark.parametrize("name", ["jtp", "bst"])
def test_it_is_known_for_some(name: str) -> None:
    with pytest.raises(UserError, match=f"release is not known for objective.name={name}"):
        config_from_dict({"objective": {"name": name, "semantics": "release"}})
