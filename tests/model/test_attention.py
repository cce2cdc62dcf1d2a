"""Visibility in attention: the mask as a table, the transcription, documents that cannot see each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextlat_dist.model import attention as attention_module
from nextlat_dist.model.attention import DocumentAttention, Documents, Ends, document_attention_mask, visible
from nextlat_dist.model.rotary import rotary_angles
from nextlat_dist.model.rows import Batch
from tests.kit import jobs, reference
from tests.kit.harness import Ranks


def test_mask_as_a_table() -> None:
    mask = document_attention_mask(torch.tensor([[0, 0, 1, 1, -1, -1], [4, 4, 4, 4, 4, 9]]))
    assert (mask.shape, mask.dtype) == ((2, 1, 6, 6), torch.bool)
    table = ["".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist()]
    assert table == [
        "x.....",
        "xx....",
        "..x...",
        "..xx..",
        "....x.",  # padding sees padding, so that no softmax is empty
        "....xx",
    ]
    assert mask[1, 0].sum(dim=-1).tolist() == [1, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("form", [document_attention_mask, Documents.of], ids=["dense", "documents"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_transcription(groups: int, form: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, -1], [0, 1, 1, 1, 1, 1, 1]])

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(7, 2, heads, 6, generator=generator, dtype=torch.float64)

    query, key, value = draw(4), draw(groups), draw(groups)
    attention = DocumentAttention(SimpleNamespace(softmax_scale=None))
    out = attention(query, key, value, form(documents))
    assert out.shape == (7, 2, 24)
    for row in (0, 1):
        expected = reference.attention(query[:, row], key[:, row], value[:, row], documents[row])
        real = documents[row] >= 0
        torch.testing.assert_close(out[real, row], expected[real], rtol=1e-12, atol=1e-12)


def test_documents_of_one_length_are_attended_to_together() -> None:
    found = Documents.of(torch.tensor([[0, 0, 1, 1, 1, -1], [3, 3, 4, 5, 5, 5]]))
    assert found.groups == ((1, 1), (2, 2), (2, 3))
    assert found.order.tolist() == [5, 0, 2, 1, 3, 4, 6, 8, 7, 9, 11]


def test_gradients_are_those_of_the_dense_mask() -> None:
    generator = torch.Generator().manual_seed(1)
    documents = jobs.ragged_rows(3, seed=5).input_documents
    shape = (documents.shape[1], 3, 4, 6)
    attention, factor = DocumentAttention(SimpleNamespace(softmax_scale=None)), torch.randn(24, 3, 24).double()
    factor = torch.where((documents.t() >= 0)[..., None], factor, 0)
    inputs = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    found = [
        torch.autograd.grad((attention(*inputs, seen) * factor).sum(), inputs)
        for seen in (Documents.of(documents), document_attention_mask(documents))
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


IDS = [[0, 0, 1, 1, 1, -1], [3, 3, 4, 5, 5, 5]]


@pytest.mark.parametrize("documents", [6, 8, None])
def test_ends_of_rows_laid_end_to_end(documents: int | None) -> None:
    found = Ends.of(torch.tensor(IDS), documents)
    bounds = [0, 2, 5, 6, 8, 9, 12]
    assert found.bounds.tolist() == bounds + [12] * (0 if documents == 6 else 2 if documents == 8 else 6)
    assert (found.bounds.dtype, found.longest) == (torch.int32, 6)


def test_so_many_documents_there_are() -> None:
    batch = Batch.of(*(torch.tensor([[*row, row[-1]] for row in [*IDS, [0] * 6]]) for _ in range(3)))
    assert [int(batch.most_documents(rows)) for rows in (1, 2, 3)] == [3, 6, 7]


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None
) -> torch.Tensor:
    """What varlen flash attention computes, which no CPU has."""
    parts = []
    for begin, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        assert end - begin <= longest
        if end > begin:
            rows = (part[begin:end] for part in (query, key, value))
            parts.append(reference.attention(*rows, torch.zeros(end - begin)))
    return torch.cat(parts).view_as(query)


@pytest.mark.parametrize("groups", [2, 4])
def test_rows_laid_end_to_end_are_the_same_rows(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    documents = jobs.ragged_rows(3, seed=5).input_documents
    shape = (documents.shape[1], 3)
    query = torch.randn(*shape, 4, 6, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(*shape, groups, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    attention = DocumentAttention(SimpleNamespace(softmax_scale=None))
    expected = attention(query, key, value, document_attention_mask(documents))
    monkeypatch.setattr(attention_module, "flash_takes", lambda query: True)
    monkeypatch.setattr(attention_module, "varlen_attention", one_by_one)
    found = attention(query, key, value, Ends.of(documents, 64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("groups", [2, 4])
def test_varlen_flash_attention(groups: int) -> None:
    documents = jobs.ragged_rows(3, seed=5).input_documents.cuda()
    shape = (documents.shape[1], 3)
    query = torch.randn(*shape, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    key, value = (
        torch.randn(*shape, groups, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)
    )
    attention = DocumentAttention(SimpleNamespace(softmax_scale=None))
    found = [
        attention(query, key, value, seen) for seen in (Ends.of(documents, 64), document_attention_mask(documents))
    ]
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad(out.float().square().sum(), (query, key, value)) for out in found]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


def test_it_is_found_once_for_all_layers() -> None:
    message = jobs.ragged_rows(2, seed=1).message
    assert visible(message) is visible(message)
    assert visible(message.clone()) is not visible(message)


def test_softmax_scale_is_used() -> None:
    query, key = torch.ones(2, 1, 1, 4), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 1, 4)
    value = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 1, 4)
    mask = document_attention_mask(torch.zeros(1, 2))
    out = DocumentAttention(SimpleNamespace(softmax_scale=0.25))(query, key, value, mask)
    assert out[1, 0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())


def test_rotary_angles() -> None:
    angles = rotary_angles(5000, 8, 10000.0, torch.bfloat16)
    assert (angles.shape, angles.dtype) == ((5000, 1, 1, 8), torch.float32)  # bf16 cannot tell 4097 from 4096
    wide = rotary_angles(5000, 8, 10000.0, torch.float64)
    assert wide[4999, 0, 0, :4].tolist() == pytest.approx([4999 * 10000.0 ** (-2 * j / 8) for j in range(4)], rel=1e-14)
    assert torch.equal(wide[..., :4], wide[..., 4:])
    torch.testing.assert_close(angles.double(), wide, rtol=1e-6, atol=0)


def hidden_states(raw: dict[str, Any], batches: list[Batch]) -> list[torch.Tensor]:
    """Final hidden states [s, b, h] of each batch of rows."""
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    with torch.no_grad():
        return [stack.run(batch.message, stop=-1)[0] for batch in batches]


def test_a_document_cannot_see_another(one_rank: Ranks) -> None:
    """Every token of one document changed: bit-equal states in all others, different ones in it, from its start on."""
    rows = jobs.ragged_rows(4, seed=11)
    rows.document_ids[0] = torch.tensor([0] * 7 + [1] * 9 + [2] * 6 + [-1] * 3)
    changed = rows.document_ids[0] == 1
    other = Batch(rows.message.clone())
    other.tokens[0, changed] = (other.tokens[0, changed] + 1) % jobs.VOCAB
    before, after = one_rank.run(hidden_states, jobs.tiny_config(), [rows, other])[0]
    inside = torch.zeros(before.shape[:2], dtype=torch.bool)
    inside[:, 0] = changed[:-1]
    assert torch.equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).any(dim=-1).all()


def test_a_state_cannot_see_the_future(one_rank: Ranks) -> None:
    rows = jobs.ragged_rows(2, seed=11)
    rows.document_ids[:] = 0
    other = Batch(rows.message.clone())
    other.tokens[:, 10] = (other.tokens[:, 10] + 1) % jobs.VOCAB
    before, after = one_rank.run(hidden_states, jobs.tiny_config(), [rows, other])[0]
    assert torch.equal(before[:10], after[:10])
    assert (before[10:] != after[10:]).any(dim=-1).all()
