"""The epsilon of a norm is that of training, wherever a model goes: it decides what small states become."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.huggingface.checkpoint_drafters import predictor_of_checkpoint
from nextlat_dist.huggingface.weights import llama_config
from nextlat_dist.inference.drafters.latent_predictor import concat_step
from tests.kit import jobs
from tests.kit.harness import Ranks


def test_the_configuration_has_the_epsilon_of_the_run() -> None:
    config = config_from_dict(jobs.tiny_config(model={"norm_epsilon": 0.0625}))
    assert llama_config(config, torch.float32, {})["rms_norm_eps"] == 0.0625


def test_a_predictor_keeps_the_epsilon_of_its_form() -> None:
    run = config_from_dict(jobs.tiny_config())
    entry = SimpleNamespace(norm_epsilon=0.0625)
    other = SimpleNamespace(
        model=run.model,
        objective=run.objective,
        predictor_hidden_size=8,
        predictor=SimpleNamespace(entry=entry, fusion="concat"),
    )
    stored, _ = predictor_of_checkpoint({}, other, "")  # type: ignore[arg-type]
    assert stored.layer_norm_epsilon == 0.0625
    paper, _ = predictor_of_checkpoint({}, run, "")
    assert paper.layer_norm_epsilon == 1e-5  # LayerNorm's, as in the paper's code


def small_states(raw: dict[str, Any]) -> tuple[list[list[float]], list[list[float]]]:
    """Next states of tiny ones, by the predictor in training and by the drafter with what is exported of it."""
    from nextlat_dist.model.latent_predictor import LatentPredictor
    from nextlat_dist.training.engine.build import build_engine

    config, dims = jobs.set_up(raw)
    engine = build_engine(config, dims)
    (module,) = (m for m in engine.module.modules() if isinstance(m, LatentPredictor))
    stored, _ = predictor_of_checkpoint({}, config, "")
    numbers = torch.Generator().manual_seed(3)
    h, e = (1e-3 * torch.randn(5, config.model.hidden_size, generator=numbers) for _ in range(2))
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=numbers))
        trained = module(h[:, None], e[:, None])[:, 0]
        weights = {name: tensor.detach() for name, tensor in module.named_parameters()}
        drafted = concat_step(weights, stored.layer_norm_epsilon)(h, e)
    return trained.tolist(), drafted.tolist()


def test_training_and_drafting_agree_on_small_states(one_rank: Ranks) -> None:
    [(trained, drafted)] = one_rank.run(small_states, jobs.tiny_config())
    torch.testing.assert_close(torch.tensor(drafted), torch.tensor(trained), rtol=1e-5, atol=1e-6)
    assert torch.tensor(trained).abs().max() > 0.05


@pytest.mark.parametrize("epsilon", [1e-6, 1e-4])
def test_another_epsilon_would_show_there(epsilon: float) -> None:
    """The negative control of the test before."""
    numbers = torch.Generator().manual_seed(3)
    weights = {"layer_norm.weight": torch.ones(64), "layer_norm.bias": torch.zeros(64)}
    weights |= {
        f"linear_{name}.weight": 0.3 * torch.randn(rows, columns, generator=numbers)
        for name, rows, columns in (("in", 24, 64), ("mid", 24, 24), ("out", 32, 24))
    }
    h, e = (1e-3 * torch.randn(5, 32, generator=numbers) for _ in range(2))
    right, wrong = (concat_step(weights, each)(h, e) for each in (1e-5, epsilon))
    assert (right - wrong).abs().max() > 0.01
