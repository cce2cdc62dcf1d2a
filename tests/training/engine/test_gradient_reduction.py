"""Gradients of a bf16 run are summed in fp32: over micro-batches and over ranks, against a sum that is done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.kit import jobs
from tests.kit.harness import Ranks

MICRO_BATCHES = 2  # of each rank


def both_sums(raw: dict[str, Any]) -> dict[str, float]:
    """{canonical name: relative difference} of the gradient that the optimizer saw in one step of two data-parallel
    ranks to the fp32 sum of the bf16 gradients of every micro-batch and rank.
    """
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import term_counts, term_weights
    from nextlat_dist.training.engine.build import build_engine

    config, dims = jobs.set_up(raw)
    engine = build_engine(config, dims)
    jobs.train_steps(engine, config, dims, range(1))
    seen = jobs.gather_full(jobs._first_gradients(engine, config), dims, engine.sharding)

    module = LayerStack(layer_list(config, dims, torch.float32))
    initialize(module, config, dims)
    module.bfloat16()
    batch = jobs.ragged_rows(config.training.global_batch_size, seed=0)
    weights = term_weights(term_counts(batch, config.objective), config.objective).float()
    set_term_weights(module, weights * dims.data_size)
    by_hand: dict[str, torch.Tensor] = {}
    for rows in batch.chunk(dims.data_size)[dims.data_rank].split(config.training.micro_batch_size):
        module(rows.message).loss.backward()
        for name, parameter in canonical_parameters(module):
            assert parameter.grad is not None
            by_hand[name] = by_hand.get(name, torch.zeros(parameter.shape)) + parameter.grad.float() / dims.data_size
            parameter.grad = None
    for gradient in by_hand.values():
        dist.all_reduce(gradient)
    return {name: float((seen[name] - gradient).norm() / gradient.norm()) for name, gradient in by_hand.items()}


def differences(ranks: Ranks, stage: int, **training: Any) -> dict[str, float]:
    raw = jobs.tiny_config(
        objective={"horizon": 1},
        parallel={"zero_stage": stage},
        training={"precision": "bf16", "micro_batch_size": 8 // (2 * MICRO_BATCHES), **training},
        optimizer={"clip_grad": 0},
    )
    found: dict[str, float] = ranks.run(both_sums, raw)[0]
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bf16_run_sums_its_gradients_in_fp32(stage: int, two_ranks: Ranks) -> None:
    found = differences(two_ranks, stage)
    assert len(found) > 20
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_bf16_communication_costs(stage: int, two_ranks: Ranks) -> None:
    """It is there to be asked for; a rounding of bf16 (2^-9) shows in the gradient of every matrix."""
    found = differences(two_ranks, stage, communication_data_type="bf16")
    assert min(found.values()) > 1e-4
    assert max(found.values()) < 2e-2
