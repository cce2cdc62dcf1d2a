"""Initial weights depend on the seed and on names, never on the layout or on which other layers exist."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.model.sharding import shard, sharding_of
from tests.kit import jobs
from tests.kit.harness import Ranks


def full_weights(raw: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    """On rank 0: every initial weight of the model that training builds in this layout, merged."""
    from nextlat_dist.training.engine.build import build_engine

    config, dims = jobs.set_up(raw)
    engine = build_engine(config, dims)
    local = {name: parameter.detach().clone() for name, parameter in canonical_parameters(engine.module)}
    full = jobs.gather_full(local, dims)
    return full if dims.rank == 0 else None


def local_parameters(raw: dict[str, Any]) -> dict[str, tuple[list[int], bool]]:
    """Shape of every parameter on this rank, and whether it is marked as sharded for the gradient norm."""
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    assert not list(stack.buffers())  # a buffer would be cast to bf16 with the weights and lost by a reshape
    found = {n: (list(p.shape), getattr(p, "tensor_model_parallel", False)) for n, p in canonical_parameters(stack)}
    assert len(found) == len(list(stack.parameters()))
    return found


def config(**parallel: int) -> dict[str, Any]:
    return jobs.tiny_config(parallel=parallel)


@pytest.fixture(scope="module")
def single(one_rank: Ranks) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = one_rank.run(full_weights, config())[0]
    return weights


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_weights_do_not_depend_on_the_layout(size: str, single: dict[str, torch.Tensor], two_ranks: Ranks) -> None:
    assert_same(two_ranks.run(full_weights, config(**{size: 2}))[0], single)


def test_a_gpt_twin_starts_from_the_same_base(single: dict[str, torch.Tensor], one_rank: Ranks) -> None:
    twin = one_rank.run(full_weights, jobs.tiny_config(objective={"name": "next_token"}))[0]
    predictor = {name for name in single if name.startswith("latent_predictor.")}
    assert len(predictor) == 5
    assert_same(twin, {name: tensor for name, tensor in single.items() if name not in predictor})


def test_weights_depend_on_the_seed_and_on_the_name(single: dict[str, torch.Tensor], one_rank: Ranks) -> None:
    other = one_rank.run(full_weights, jobs.tiny_config(training={"seed": 7}))[0]
    matrices = [name for name, tensor in single.items() if tensor.ndim > 1]
    assert not any(torch.equal(single[name], other[name]) for name in matrices)
    first, second = (single[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_spread_of_initial_weights(single: dict[str, torch.Tensor]) -> None:
    for name, tensor in single.items():
        if name.endswith("bias"):
            assert tensor.count_nonzero() == 0, name
        elif tensor.ndim == 1:
            assert tensor.tolist() == [1.0] * len(tensor), name
        else:  # what writes to the residual stream is smaller: four layers write twice each
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / math.sqrt(8) if residual else 0.02
            assert tensor.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(tensor.mean().item()) < std * 6 / math.sqrt(tensor.numel()), name


@pytest.mark.parametrize("tie", [False, True])
def test_every_parameter_has_its_rule_and_its_part(tie: bool, one_rank: Ranks, two_ranks: Ranks) -> None:
    model = {"tie_embeddings": tie}
    whole = one_rank.run(local_parameters, jobs.tiny_config(model=model))[0]
    parallel = {"tensor_model_parallel_size": 2}
    assert ("output_layer.weight" in whole) is not tie
    for local in two_ranks.run(local_parameters, jobs.tiny_config(model=model, parallel=parallel)):
        assert local.keys() == whole.keys()
        for name, (shape, _) in whole.items():
            rule = sharding_of(name)
            expected = list(shard(torch.empty(shape), rule, 0, 2).shape)
            assert local[name] == (expected, rule.dim is not None), name
