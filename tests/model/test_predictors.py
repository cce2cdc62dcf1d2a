"""Another form of latent predictor, brought by an entry: it trains under tensor parallelism and drafts as it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextlat_dist.config import config_from_dict
from nextlat_dist.config.entries import PREDICTORS, resolve
from nextlat_dist.model.sharding import REPLICATED, Sharding, sharding_of, sharding_rules
from nextlat_dist.plan.counting import flops_per_token, parameter_counts
from tests.kit import jobs
from tests.kit.harness import Ranks

NAME = "tests.kit.gated_predictor:ENTRY"


def steps(raw: dict[str, Any]) -> dict[str, Any] | None:
    PREDICTORS.allow(NAME)
    return jobs.first_steps(raw, steps=2)


def trained_and_drafted(raw: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next state by the module that trains, and by the function that drafts with its weights."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list

    PREDICTORS.allow(NAME)
    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    predictor: Any = stack.layers[-1]
    predictor = predictor.latent_predictor
    generator = torch.Generator().manual_seed(4)
    h, embedded = (torch.randn(5, config.model.hidden_size, generator=generator) for _ in range(2))
    weights = {
        name.removeprefix("latent_predictor."): tensor.detach()
        for name, tensor in canonical_parameters(stack)
        if name.startswith("latent_predictor.")
    }
    step = resolve(config.predictor.entry.drafting)(weights, 1e-5)
    return predictor(h[:, None], embedded[:, None])[:, 0].detach(), step(h, embedded)


@pytest.mark.parametrize("fusion", ["concat", NAME])
def test_a_form_drafts_as_it_trains(fusion: str, one_rank: Ranks) -> None:
    trained, drafted = one_rank.run(trained_and_drafted, jobs.tiny_config(predictor={"fusion": fusion}))[0]
    torch.testing.assert_close(trained, drafted)
    assert trained.std() > 0.5


def test_a_form_trains_under_tensor_parallelism(one_rank: Ranks, two_ranks: Ranks) -> None:
    raw = jobs.tiny_config(predictor={"fusion": NAME}, training={"micro_batch_size": 2})
    alone = one_rank.run(steps, raw)[0]
    raw["parallel"] = {"tensor_model_parallel_size": 2, "zero_stage": 1}
    found = two_ranks.run(steps, raw)[0]
    assert {name for name in found["gradients"] if name.startswith("latent_predictor.")} == {
        "latent_predictor.gate.weight", "latent_predictor.out.weight",
    }  # fmt: skip
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-7)
    for here, there in zip(found["metrics"], alone["metrics"], strict=True):
        assert here == pytest.approx(there, rel=1e-5)


def test_a_form_rules_how_its_parameters_are_counted_and_split() -> None:
    PREDICTORS.allow(NAME)
    raw = jobs.tiny_config(predictor={"fusion": NAME, "hidden_size": 8}, objective={"horizon": 2})
    config = config_from_dict(raw)
    assert parameter_counts(config)["latent_predictor"] == 2 * 32 * 8
    paper = config_from_dict(jobs.tiny_config(predictor={"hidden_size": 8}, objective={"horizon": 2}))
    more = parameter_counts(paper)["latent_predictor"] - 2 * 32 * 8
    assert flops_per_token(paper) - flops_per_token(config) == 2 * 6 * more
    assert sharding_of("latent_predictor.out.weight", sharding_rules(config)) == Sharding(1)
    with pytest.raises(AssertionError, match="no sharding rule"):
        sharding_of("latent_predictor.layer_norm.weight", sharding_rules(config))
    assert sharding_of("latent_predictor.layer_norm.weight", sharding_rules(paper)) == REPLICATED
