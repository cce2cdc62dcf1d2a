"""Losses of every objective see nothing of other documents, and for the next token nothing that comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat_dist.model.rows import Batch
from tests.kit import jobs
from tests.kit.harness import Ranks

OBJECTIVES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "next_token"},
    "nextlat": {"name": "nextlat", "horizon": 3},
    "mtp": {"name": "mtp", "horizon": 3},
    "jtp": {"name": "jtp", "horizon": 3},
    "bst": {"name": "bst"},
}
CHANGED = 12  # the token that changes


def sums_and_gradients(raw: dict[str, Any], batches: list[Batch], terms: int | None) -> list[tuple[Any, Any]]:
    """Of each batch, the sums of the first `terms` terms and the gradient of their sum for every parameter."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float64))
    initialize(stack, config, dims)
    parameters = dict(canonical_parameters(stack))
    found = []
    for batch in batches:
        sums = stack(batch.message)[:terms]
        gradients = torch.autograd.grad(sums.sum(), list(parameters.values()), allow_unused=True)
        found.append((sums.detach(), gradients))
    return found


def assert_equal(found: list[tuple[Any, Any]]) -> None:
    (sums, gradients), (others, of_others) = found
    assert torch.equal(sums, others)
    assert (sums > 0).any()
    for one, other in zip(gradients, of_others, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def rows_of_documents(*, loss_of_changed: bool) -> list[Batch]:
    """Rows, and the same with every token of a document in the middle changed; whether its own losses count."""
    tokens = jobs.ragged_rows(2, seed=8).tokens
    documents = torch.tensor([[0] * 7 + [1] * 9 + [2] * 6 + [-1] * 3] * 2)
    loss_mask = (documents >= 0) & (loss_of_changed | (documents != 1))
    changed = torch.where(documents == 1, (tokens + 1 + torch.arange(25)) % jobs.VOCAB, tokens)
    return [Batch.of(part, documents, loss_mask, tokens) for part in (tokens, changed)]


@pytest.mark.parametrize("name", ["gpt", "mtp", "jtp", "bst"])
def test_no_other_document(name: str, one_rank: Ranks) -> None:
    """NextLat's latent term counts where no loss token is: see test_document_isolation.py."""
    raw = jobs.tiny_config(objective=OBJECTIVES[name])
    assert_equal(one_rank.run(sums_and_gradients, raw, rows_of_documents(loss_of_changed=False), None)[0])
    before, after = one_rank.run(sums_and_gradients, raw, rows_of_documents(loss_of_changed=True), None)[0]
    assert not torch.equal(before[0], after[0])


def rows_of_one_document(last: int) -> list[Batch]:
    """Rows of one document, and the same with one token changed; targets up to token `last` count."""
    tokens = jobs.ragged_rows(2, seed=8).tokens
    changed = tokens.clone()
    changed[:, CHANGED] = (changed[:, CHANGED] + 1) % jobs.VOCAB
    loss_mask = torch.arange(tokens.shape[1]).expand_as(tokens) <= last
    documents = torch.zeros_like(tokens)
    return [Batch.of(part, documents, loss_mask, tokens) for part in (tokens, changed)]


@pytest.mark.parametrize("name", ["gpt", "nextlat", "mtp", "jtp"])
def test_the_next_token_sees_nothing_that_comes_later(name: str, one_rank: Ranks) -> None:
    """x_12 is first read where x_13 is predicted."""
    raw = jobs.tiny_config(objective=OBJECTIVES[name])
    assert_equal(one_rank.run(sums_and_gradients, raw, rows_of_one_document(CHANGED), 1)[0])
    before, after = one_rank.run(sums_and_gradients, raw, rows_of_one_document(CHANGED + 1), 1)[0]
    assert not torch.equal(before[0], after[0])
