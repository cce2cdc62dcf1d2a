"""The latent predictor is h + MLP(LayerNorm([h, e])), and no rank holds more than its share of the three matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nextlat_dist.model.sharding import shard, sharding_of
from tests.kit import jobs, reference
from tests.kit.harness import Ranks

HIDDEN, WIDTH = 32, 48
SHAPES = {
    "layer_norm.weight": (2 * HIDDEN,),
    "layer_norm.bias": (2 * HIDDEN,),
    "linear_in.weight": (WIDTH, 2 * HIDDEN),
    "linear_mid.weight": (WIDTH, WIDTH),
    "linear_out.weight": (HIDDEN, WIDTH),
}


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_weights() -> dict[str, torch.Tensor]:
    return {name: draw(*shape, seed=index) / 4 for index, (name, shape) in enumerate(SHAPES.items())}


SMALL = 1e-3  # states of this size have a variance of 1e-6, so that the norm's epsilon of 1e-5 decides


def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h, e(x) and a factor for every element of the output, [s, b, h] each."""
    return draw(5, 2, HIDDEN, seed=10), draw(5, 2, HIDDEN, seed=11), draw(5, 2, HIDDEN, seed=12)


def plain(hidden: torch.Tensor, embedded: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    normed = F.layer_norm(
        torch.cat([hidden, embedded], dim=-1),
        (2 * HIDDEN,),
        weights["layer_norm.weight"],
        weights["layer_norm.bias"],
        eps=1e-5,
    )
    inner = F.gelu(F.gelu(normed @ weights["linear_in.weight"].T) @ weights["linear_mid.weight"].T)
    return hidden + inner @ weights["linear_out.weight"].T


def predict(tensor_size: int, scale: float = 1.0) -> dict[str, Any]:
    """Output and gradients of the sharded predictor on this rank, for states of that size; epsilon of its norm."""
    from nextlat_dist.model.decoder_layer import transformer_config
    from nextlat_dist.model.latent_predictor import LatentPredictor

    config, dims = jobs.set_up(jobs.tiny_config(parallel={"tensor_model_parallel_size": tensor_size}))
    shared = transformer_config(config.model, tensor_size, torch.float64)
    predictor = LatentPredictor(shared, WIDTH, dims.process_groups)
    parameters = dict(predictor.named_parameters())
    assert parameters.keys() == SHAPES.keys()
    with torch.no_grad():
        for name, weight in full_weights().items():
            rule = sharding_of(f"latent_predictor.{name}")
            parameters[name].copy_(shard(weight, rule, dims.tensor_rank, tensor_size))
    hidden, embedded, factor = (states()[0] * scale, states()[1] * scale, states()[2])
    sources = [hidden.requires_grad_(), embedded.requires_grad_(), *parameters.values()]
    output = predictor(hidden, embedded)
    gradients = torch.autograd.grad((output * factor).sum(), sources)
    return {
        "output": output.detach(),
        "epsilon": predictor.layer_norm.eps,
        "gradients": dict(zip(["hidden", "embedded", *parameters], gradients, strict=True)),
    }


@pytest.mark.parametrize(("pool", "size"), [("one_rank", 1), ("two_ranks", 2)])
def test_output_and_gradients_are_the_formulas(pool: str, size: int, request: pytest.FixtureRequest) -> None:
    weights = {name: weight.requires_grad_() for name, weight in full_weights().items()}
    hidden, embedded, factor = states()
    sources = {"hidden": hidden.requires_grad_(), "embedded": embedded.requires_grad_(), **weights}
    output = plain(hidden, embedded, weights)
    expected = torch.autograd.grad((output * factor).sum(), list(sources.values()))
    ranks: Ranks = request.getfixturevalue(pool)
    for rank, answer in enumerate(ranks.run(predict, size)):
        torch.testing.assert_close(answer["output"], output.detach(), rtol=1e-12, atol=1e-12)
        for name, gradient in zip(sources, expected, strict=True):
            whole = name not in SHAPES
            part = gradient if whole else shard(gradient, sharding_of(f"latent_predictor.{name}"), rank, size)
            torch.testing.assert_close(answer["gradients"][name], part, rtol=1e-12, atol=1e-12, msg=name)


def test_the_epsilon_of_training_is_the_exports_and_the_drafters(one_rank: Ranks) -> None:
    """Where it decides: training's module, what an export records, and the step that drafts with what it recorded."""
    from nextlat_dist.config import load_config
    from nextlat_dist.huggingface.checkpoint_drafters import predictor_of_checkpoint
    from nextlat_dist.inference.drafters.latent_predictor import concat_step

    (answer,) = one_rank.run(predict, 1, SMALL)
    weights = full_weights()
    hidden, embedded, _ = states()
    expected = plain(hidden * SMALL, embedded * SMALL, weights)
    torch.testing.assert_close(answer["output"], expected, rtol=1e-12, atol=1e-12)

    named = {f"latent_predictor.{name}": weight for name, weight in weights.items()}
    recorded, _ = predictor_of_checkpoint(named, load_config(None, ["predictor.hidden_size=48"]), "")
    assert recorded.layer_norm_epsilon == answer["epsilon"] == 1e-5
    drafted = concat_step(weights, recorded.layer_norm_epsilon)(hidden * SMALL, embedded * SMALL)
    torch.testing.assert_close(drafted, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(concat_step(weights, 1e-6)(hidden * SMALL, embedded * SMALL), expected, rtol=1e-2)


def test_another_form_records_its_own_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from nextlat_dist.config import load_config
    from nextlat_dist.config.entries import PREDICTORS
    from nextlat_dist.huggingface.checkpoint_drafters import predictor_of_checkpoint
    from nextlat_dist.model.predictors import CONCAT

    monkeypatch.setitem(PREDICTORS._found, "rough", replace(CONCAT, name="rough", norm_epsilon=0.25))
    named = {f"latent_predictor.{name}": weight for name, weight in full_weights().items()}
    recorded, _ = predictor_of_checkpoint(named, load_config(None, ["predictor.fusion=rough"]), "")
    assert recorded.layer_norm_epsilon == 0.25


def test_the_formula_is_the_transcriptions() -> None:
    weights = full_weights()
    hidden, embedded, _ = states()
    named = {f"latent_predictor.{name}": weight for name, weight in weights.items()}
    expected = reference.predict(hidden[3, 1], embedded[3, 1], named)
    torch.testing.assert_close(plain(hidden, embedded, weights)[3, 1], expected, rtol=1e-12, atol=1e-12)


def test_two_ranks_hold_half_of_every_matrix(two_ranks: Ranks) -> None:
    for answer in two_ranks.run(predict, 2):
        shapes = {name: tuple(gradient.shape) for name, gradient in answer["gradients"].items() if name in SHAPES}
        assert shapes == {
            "layer_norm.weight": (2 * HIDDEN,),
            "layer_norm.bias": (2 * HIDDEN,),
            "linear_in.weight": (WIDTH // 2, 2 * HIDDEN),
            "linear_mid.weight": (WIDTH // 2, WIDTH),
            "linear_out.weight": (HIDDEN, WIDTH // 2),
        }
