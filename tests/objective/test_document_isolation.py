"""Changing one document of a packed row leaves the loss and the gradients of every other document bit-equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat_dist.model.rows import Batch
from tests.kit import jobs
from tests.kit.harness import Ranks

HORIZON = 3
TERMS = 1 + 2 * HORIZON


def two_batches() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and the same rows with every token of document 1 of row 0 changed."""
    rows = jobs.ragged_rows(3, seed=8)
    loss_mask = rows.loss_mask
    rows.document_ids[0] = torch.tensor([0] * 7 + [1] * 9 + [2] * 6 + [-1] * 3)
    loss_mask[0] = rows.document_ids[0] >= 0
    rows = Batch.of(rows.tokens, rows.document_ids, loss_mask, rows.labels)
    changed = Batch(rows.message.clone())
    document = rows.document_ids[0] == 1
    changed.tokens[0, document] = (rows.tokens[0, document] + 1 + torch.arange(9)) % jobs.VOCAB
    return rows, changed


def in_changed_document(length: int = jobs.LENGTH) -> torch.Tensor:
    """bool [length, b]: positions of the document that changes."""
    return (two_batches()[0].document_ids[:, :length] == 1).t() & (torch.arange(3) == 0)


def backward(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """For each of the two batches: what each position adds to each term, the gradient of the loss for every embedded
    position, and the gradient of the other documents' loss for every parameter.
    """
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.objective import nextlat
    from nextlat_dist.objective.masks import masked_sum
    from nextlat_dist.objective.terms import term_counts, term_weights

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    parameters = dict(canonical_parameters(stack))
    embedded: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []

    embed = stack.layers[0].whole

    def keep_embedding(message: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = embed(message)
        output.retain_grad()
        embedded.append(output)
        return output

    def keep_positions(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions.append(torch.where(mask, values, torch.zeros_like(values)))
        return masked_sum(values, mask)

    stack.layers[0].whole = keep_embedding
    nextlat.masked_sum = keep_positions  # the one place where positions become a sum
    results = []
    try:
        for rows in two_batches():
            embedded.clear(), positions.clear()
            weights = term_weights(term_counts(rows, config.objective), config.objective).float()
            (stack(rows.message) * weights).sum().backward(retain_graph=True)
            # In the order of the calls: hidden and kl of step 1, of step 2, …, next_token last.
            others = sum(value[~in_changed_document(len(value))].sum() for value in positions)
            assert isinstance(others, torch.Tensor)
            gradients = torch.autograd.grad(others, list(parameters.values()))
            results.append(
                {
                    "positions": [value.detach() for value in positions],
                    "embedded": [tensor.grad for tensor in embedded],
                    "parameters": dict(zip(parameters, gradients, strict=True)),
                }
            )
    finally:
        nextlat.masked_sum = masked_sum
    return results


@pytest.fixture(scope="module")
def before_and_after(one_rank: Ranks) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = one_rank.run(backward, jobs.tiny_config(objective={"horizon": HORIZON}))[0]
    return results


def test_loss_of_every_position(before_and_after: list[dict[str, Any]]) -> None:
    before, after = (result["positions"] for result in before_and_after)
    assert len(before) == len(after) == TERMS
    for ours, theirs in zip(before, after, strict=True):
        inside = in_changed_document(len(ours))
        assert torch.equal(ours[~inside], theirs[~inside])
        assert ours[~inside].count_nonzero() > 0
        counted = ours[inside] != 0
        assert counted.any()
        assert (ours[inside] != theirs[inside])[counted].all()


def test_gradient_of_every_position(before_and_after: list[dict[str, Any]]) -> None:
    """Both uses of the embedding: as the model's input, and as what the latent predictor reads."""
    before, after = (result["embedded"] for result in before_and_after)
    assert len(before) == len(after) == 2
    for ours, theirs in zip(before, after, strict=True):
        inside = in_changed_document()
        assert torch.equal(ours[~inside], theirs[~inside])
        assert ours[~inside].count_nonzero() > 0
        used = ours[inside].abs().amax(dim=-1) > 0
        assert used.sum() >= 8  # the predictor never reads the first token of a document
        assert (ours[inside] != theirs[inside]).any(dim=-1)[used].all()


def test_gradient_of_every_parameter_from_the_other_documents(before_and_after: list[dict[str, Any]]) -> None:
    before, after = (result["parameters"] for result in before_and_after)
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert gradient.count_nonzero() > 0, name
