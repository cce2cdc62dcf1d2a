"""Parameter and FLOP counts from the configuration are those of the model that is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextlat_dist.config import config_from_dict, load_config
from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.model.rows import Batch
from nextlat_dist.plan.counting import flops_per_token, parameter_counts
from tests.kit import jobs
from tests.kit.harness import Ranks

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS: dict[str, dict[str, Any]] = {
    "nextlat": {},
    "gpt": {"objective": {"name": "next_token"}},
    "mtp": {"objective": {"name": "mtp", "horizon": 2}},
    "jtp": {"objective": {"name": "jtp", "horizon": 2}},
    "detached": {"objective": {"detach_base": True}},
    "tied": {"model": {"tie_embeddings": True}},
    "free-head": {"objective": {"stop_gradient_head": False, "stop_gradient_target": False}},
    "kl-logged-only": {"objective": {"lambda_kl": 0}},
    "one-group": {"model": {"num_query_groups": 1}, "predictor": {"hidden_size": None}},
}


def built(raw: dict[str, Any]) -> dict[str, list[int]]:
    """Shape of every parameter of the built model, and under `flops` what one forward and backward pass multiplies."""
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)
    ragged = jobs.ragged_rows(2, seed=0, vocab=config.model.vocab_size, length=config.data.sequence_length)
    one_document = torch.zeros_like(ragged.document_ids)  # a row, so that a position attends to all of it
    rows = Batch.of(ragged.tokens, one_document, one_document + 1)
    # Attention as plain matrix products: the counter knows no fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stack(rows.message).sum().backward()
    shapes = {name: list(parameter.shape) for name, parameter in canonical_parameters(stack)}
    return {**shapes, "flops": [counter.get_total_flops()]}


@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_of_the_built_model(model: str, one_rank: Ranks) -> None:
    raw = jobs.tiny_config(**MODELS[model])
    config = config_from_dict(raw)
    shapes = one_rank.run(built, raw)[0]
    del shapes["flops"]
    objectives = ("latent_predictor", "mtp", "fetch")
    sizes: dict[str, int] = {"embedding": 0, "decoder": 0, "output_layer": 0, **dict.fromkeys(objectives, 0)}
    for name, shape in shapes.items():
        part = name.split(".", maxsplit=1)[0]
        if part in ("embedding", "output_layer"):
            assert shape[0] == config.model.padded_vocab_size
            shape[0] = config.model.vocab_size
        sizes[part] += torch.Size(shape).numel()
    counts = parameter_counts(config)
    assert {name: counts[name] for name in sizes} == sizes
    assert counts["base"] == sizes["embedding"] + sizes["decoder"] + sizes["output_layer"]
    assert counts["total"] == counts["base"] + sum(sizes[part] for part in objectives)


@pytest.mark.parametrize("model", ["nextlat", "gpt", "mtp", "jtp", "free-head", "kl-logged-only", "one-group"])
def test_flops_are_those_of_a_training_pass(model: str, one_rank: Ranks) -> None:
    sections = MODELS[model]
    raw = jobs.tiny_config(data={"sequence_length": 96}, **sections)
    measured = one_rank.run(built, raw)[0]["flops"][0] / (2 * 96)
    # Norms and the shorter rows of later rollout steps are small; the rest is exact.
    assert flops_per_token(config_from_dict(raw)) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("model", ["nextlat", "gpt", "mtp"])
def test_attention_counts_what_a_token_attends_to(model: str) -> None:
    config = config_from_dict(jobs.tiny_config(**MODELS[model]))
    layers = config.model.num_layers + (2 if model == "mtp" else 0)
    whole, length, hidden = flops_per_token(config), config.data.sequence_length, config.model.hidden_size
    assert flops_per_token(config, length) == whole
    assert whole - flops_per_token(config, 5.5) == pytest.approx(layers * 12 * hidden * (length - 5.5))


def test_full_attention_would_be_counted_too_high() -> None:
    """At 16k tokens in one document the paper's model has 27 % less to compute than a row without a mask."""
    config = load_config(CONFIGS / "fineweb_edu_1p3b.yaml", ["data.sequence_length=16384", "objective.name=next_token"])
    assert flops_per_token(config) / flops_per_token(config, (1 + 16384) / 2) == pytest.approx(1.378, abs=0.001)


def test_the_papers_parameter_counts() -> None:
    counts = parameter_counts(load_config(CONFIGS / "fineweb_edu_1p3b.yaml"))
    assert (round(counts["base"] / 1e9, 2), round(counts["total"] / 1e9, 2)) == (1.32, 1.40)
