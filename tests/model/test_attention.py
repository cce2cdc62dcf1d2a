"""Visibility in attention: the mask as a table, the transcription, documents that cannot see each other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextlat_dist.model.attention import DocumentMaskedAttention, document_attention_mask
from nextlat_dist.model.decoder_layer import rotary_angles
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


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_equals_the_transcription(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, -1], [0, 1, 1, 1, 1, 1, 1]])

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(7, 2, heads, 6, generator=generator, dtype=torch.float64)

    query, key, value = draw(4), draw(groups), draw(groups)
    attention = DocumentMaskedAttention(SimpleNamespace(softmax_scale=None))
    out = attention(query, key, value, document_attention_mask(documents))
    assert out.shape == (7, 2, 24)
    for row in (0, 1):
        expected = reference.attention(query[:, row], key[:, row], value[:, row], documents[row])
        torch.testing.assert_close(out[:, row], expected, rtol=1e-12, atol=1e-12)


def test_softmax_scale_is_used() -> None:
    query, key = torch.ones(2, 1, 1, 4), torch.tensor([1.0, 2.0])[:, None, None, None].expand(2, 1, 1, 4)
    value = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 1, 4)
    mask = document_attention_mask(torch.zeros(1, 2))
    out = DocumentMaskedAttention(SimpleNamespace(softmax_scale=0.25))(query, key, value, mask)
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
