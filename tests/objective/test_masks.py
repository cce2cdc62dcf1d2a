"""Masks of each term: a row worked out by hand, and random rows against the transcription's counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.masks import masked_sum, next_token_mask, state_mask, token_mask
from nextlat_dist.objective.terms import term_counts
from tests.kit.jobs import ragged_rows
from tests.kit.reference import counts_for_hidden, counts_for_kl, counts_for_next_token

# position j        0  1  2  3  4  5  6  7  8   and the last one, 9, which is only ever a target
DOCUMENTS = [[0, 0, 0, 0, 1, 1, 2, 2, 2, -1]]
#   a prompt of two, a document without a prompt, a document that is one token of prompt
LOSS = [[0, 0, 1, 1, 1, 1, 0, 1, 1, 0]]


def by_hand() -> Batch:
    return Batch.of(torch.arange(10)[None], torch.tensor(DOCUMENTS), torch.tensor(LOSS))


def marks(mask: torch.Tensor) -> str:
    """The mask of the only row, one character per position."""
    assert mask.shape[1] == 1
    return "".join("x" if value else "." for value in mask[:, 0].tolist())


def test_next_token_by_hand() -> None:
    # 0 -> 1 is prompt; 3 -> 4 and 5 -> 6 leave the document; 8 -> 9 runs into padding.
    assert marks(next_token_mask(by_hand())) == ".xx.x.xx."


@pytest.mark.parametrize(
    ("step", "hidden", "kl"),
    [
        (1, "xxx.x.xx", "xx....x."),  # 2 -> 3 and 4 -> 5 end where the next token is another document's
        (2, "xx....x", "x......"),
        (3, "x.....", "......"),
        (4, ".....", "....."),  # no document is longer than the rollout
        (8, ".", "."),
    ],
)
def test_rollout_by_hand(step: int, hidden: str, kl: str) -> None:
    assert (marks(state_mask(by_hand(), step)), marks(token_mask(by_hand(), step))) == (hidden, kl)


def test_a_prompt_counts_for_hidden_and_not_for_kl() -> None:
    rows = Batch.of(torch.zeros(1, 5), torch.zeros(1, 5), torch.tensor([[0, 0, 0, 0, 1]]))
    assert (marks(state_mask(rows, 1)), marks(token_mask(rows, 1))) == ("xxx", "..x")


def test_padding_counts_for_nothing() -> None:
    """Not even where a loss mask was set by mistake: two padded positions are equal documents otherwise."""
    rows = Batch.of(torch.zeros(2, 6), torch.full((2, 6), -1), torch.ones(2, 6))
    assert term_counts(rows, ObjectiveConfig(horizon=3)).tolist() == [0.0] * 7


def test_a_document_no_longer_than_the_horizon_has_no_such_step() -> None:
    rows = Batch.of(torch.zeros(1, 7), torch.tensor([[0, 0, 1, 1, 1, 2, 2]]), torch.ones(1, 7))
    counts = term_counts(rows, ObjectiveConfig(horizon=5)).tolist()
    # The last token of the row has no state, so document 2 is one position long.
    assert counts == [4.0, 3.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_counts_are_float64_in_the_order_of_the_terms() -> None:
    counts = term_counts(by_hand(), ObjectiveConfig(horizon=2))
    assert counts.dtype == torch.float64
    assert counts.tolist() == [5.0, 6.0, 3.0, 3.0, 1.0]
    assert term_counts(by_hand(), ObjectiveConfig(name="next_token")).tolist() == [5.0]


def test_rows_carry_what_they_were_packed_from() -> None:
    rows = by_hand()
    assert rows.message.dtype == torch.int64
    assert (rows.tokens[0].tolist(), rows.document_ids[0].tolist(), rows.loss_mask[0].tolist()) == (
        list(range(10)),
        DOCUMENTS[0],
        LOSS[0],
    )
    assert (rows.labels.tolist(), rows.inputs.tolist()) == (rows.tokens.tolist(), [list(range(9))])
    assert rows.targets.tolist() == [[token] for token in range(1, 10)]


def test_parts_of_a_batch_know_their_rows() -> None:
    tokens = torch.arange(24).reshape(4, 6)
    batch = Batch.of(tokens, tokens + 1, tokens % 2, tokens + 2, first_row=2**40)
    for parts in (batch.split(3), batch.chunk(2)):
        assert [len(part) for part in parts] in ([3, 1], [2, 2])
        assert torch.cat([part.row_numbers for part in parts]).tolist() == [2**40 + row for row in range(4)]
        assert torch.equal(torch.cat([part.labels for part in parts]), tokens + 2)
    assert (len(batch), batch.width) == (4, 6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_masked_value_never_takes_part(bad: float) -> None:
    values = torch.tensor([1.0, bad, 2.0], requires_grad=True)
    total = masked_sum(values, torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 3.0
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 0.0, 1.0]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), length=st.integers(4, 16))
def test_random_rows_count_as_in_the_transcription(seed: int, length: int) -> None:
    rows = ragged_rows(2, seed=seed, length=length)
    documents, loss = rows.document_ids, rows.loss_mask
    expected = torch.tensor([[counts_for_next_token(documents, loss, b, t) for b in (0, 1)] for t in range(length)])
    assert torch.equal(next_token_mask(rows), expected)
    counts = [int(expected.sum())]
    steps = [(state_mask(rows, step), token_mask(rows, step)) for step in (1, 2, 3)]
    for step, (hidden, kl) in enumerate(steps, start=1):
        positions = range(length - step)
        assert hidden.tolist() == [[counts_for_hidden(documents, b, t, step) for b in (0, 1)] for t in positions]
        assert kl.tolist() == [[counts_for_kl(documents, loss, b, t, step) for b in (0, 1)] for t in positions]
    counts += [int(hidden.sum()) for hidden, _ in steps] + [int(kl.sum()) for _, kl in steps]
    assert term_counts(rows, ObjectiveConfig(horizon=3)).tolist() == counts
