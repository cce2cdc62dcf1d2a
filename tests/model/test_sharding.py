"""The sharding table: cutting and merging are inverse, and a rank's part is the part it computes with."""

from __future__ import annotations

import pytest
import torch

from nextlat_dist.model.sharding import REPLICATED, Sharding, merge, shard, sharding_of

NAMES = {
    "embedding.word_embeddings.weight": Sharding(0),
    "output_layer.weight": Sharding(0),
    "decoder.layers.3.self_attention.linear_qkv.weight": Sharding(0),
    "decoder.layers.3.self_attention.linear_proj.weight": Sharding(1),
    "decoder.layers.11.mlp.linear_fc1.weight": Sharding(0, blocks=2),
    "decoder.layers.11.mlp.linear_fc2.weight": Sharding(1),
    "latent_predictor.linear_in.weight": Sharding(0),
    "latent_predictor.linear_mid.weight": Sharding(0),
    "latent_predictor.linear_out.weight": Sharding(1),
    "decoder.layers.0.input_layernorm.weight": REPLICATED,
    "decoder.layers.0.pre_mlp_layernorm.weight": REPLICATED,
    "decoder.final_layernorm.weight": REPLICATED,
    "latent_predictor.layer_norm.weight": REPLICATED,
    "latent_predictor.layer_norm.bias": REPLICATED,
    "mtp.layers.0.self_attention.linear_qkv.weight": Sharding(0),
    "mtp.layers.12.final_layernorm.weight": REPLICATED,
}
UNLISTED = [
    "decoder.layers.0.mlp.linear_fc3.weight",
    "linear_in.weight",
    "lm_head.weight",
    "decoder.layers.0.self_attention.q_layernorm.weight",  # ends as a listed name does
    "decoder.layers.0.more.input_layernorm.weight",
    "decoder.layers.0.1.input_layernorm.weight",
    "decoder.layers.0.input_layernorm.weight.more",
    "decoder_layers_0_input_layernorm_weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_rule_of_every_parameter(name: str) -> None:
    assert sharding_of(name) == NAMES[name]


@pytest.mark.parametrize("name", UNLISTED)
def test_an_unlisted_parameter_has_no_silent_default(name: str) -> None:
    with pytest.raises(AssertionError, match="no sharding rule"):
        sharding_of(name)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_merge_is_the_inverse_of_shard(name: str, size: int) -> None:
    rule = NAMES[name]
    full = torch.randn(16, 24) if rule.dim is not None else torch.randn(16)
    parts = [shard(full, rule, rank, size) for rank in range(size)]
    assert torch.equal(merge(parts, rule), full)
    if rule.dim is not None:
        assert all(part.shape[rule.dim] * size == full.shape[rule.dim] and part.is_contiguous() for part in parts)
        assert sum(part.numel() for part in parts) == full.numel()


def test_plain_rows_and_columns() -> None:
    full = torch.arange(12).reshape(4, 3)
    assert torch.equal(shard(full, Sharding(0), 1, 2), full[2:])
    assert torch.equal(shard(full, Sharding(1), 2, 3), full[:, 2:])


def test_a_gated_matrix_gives_every_rank_its_gate_and_its_up() -> None:
    gate, up = torch.arange(4)[:, None], torch.arange(4)[:, None] + 10
    full = torch.cat([gate, up])
    rule = Sharding(0, blocks=2)
    assert shard(full, rule, 0, 2).flatten().tolist() == [0, 1, 10, 11]
    assert shard(full, rule, 1, 2).flatten().tolist() == [2, 3, 12, 13]
    assert merge([shard(full, rule, rank, 4) for rank in range(4)], rule).tolist() == full.tolist()
