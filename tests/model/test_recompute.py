"""Recomputation changes no bit of a gradient, and keeps less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from tests.kit import jobs
from tests.kit.harness import Ranks


def gradients(raw: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Of every parameter, and the bytes that were alive at most."""
    from nextlat_dist.bench.meta_tensors import Storages
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import term_counts, term_weights

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    rows = jobs.ragged_rows(4, seed=3)
    set_term_weights(stack, term_weights(term_counts(rows, config.objective), config.objective))
    stack(rows.message).loss.backward()  # warms up whatever is made once
    stack.zero_grad()
    with Storages(stack.parameters()) as storages:
        stack(rows.message).loss.backward()
    return {name: p.grad for name, p in canonical_parameters(stack) if p.grad is not None}, storages.peak


@pytest.mark.parametrize("objective", ["nextlat", "mtp"])
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}], ids=["1", "tp2"])
def test_bit_equal_and_smaller(objective: str, layout: dict[str, Any], one_rank: Ranks, two_ranks: Ranks) -> None:
    ranks = two_ranks if layout else one_rank
    found = {}
    for recompute in ("none", "selective", "full"):
        raw = jobs.tiny_config(
            objective={"name": objective},
            parallel=layout,
            training={"recompute": recompute},
            model={"ffn_hidden_size": 512, "num_layers": 6},
        )
        found[recompute] = ranks.run(gradients, raw)
    for (none, most), (selective, less), (full, least) in zip(*found.values(), strict=True):
        assert none.keys() == selective.keys() == full.keys()
        for name, gradient in none.items():
            assert torch.equal(selective[name], gradient), name
            assert torch.equal(full[name], gradient), name
        assert least < less < 0.85 * most


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_selective_attention_keeps_nothing_of_its_own(recompute: Literal["none", "selective"]) -> None:
    from nextlat_dist.model.attention import visible
    from nextlat_dist.model.decoder_layer import layer_spec
    from nextlat_dist.parallel.device import third_parties

    with third_parties():
        spec = layer_spec(recompute)
    core = spec.submodules.self_attention.submodules.core_attention
    attention = core(SimpleNamespace(softmax_scale=None))
    rows, kept = jobs.ragged_rows(2, seed=3), list[torch.Tensor]()
    heads = torch.randn(jobs.LENGTH, 2, 4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(heads, heads, heads, visible(rows.message))
    own = [tensor for tensor in kept if tensor.numel() and tensor.data_ptr() != heads.data_ptr()]
    assert bool(own) == (recompute == "none")
