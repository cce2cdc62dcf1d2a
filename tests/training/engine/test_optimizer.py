"""The learning rate over tokens, the two parameter groups, and the exact gradient norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextlat_dist.config.schema import OptimizerConfig, ScheduleConfig
from nextlat_dist.training.engine.gradient_norm import clip_gradients, of_parameters, of_partition, share_of
from nextlat_dist.training.engine.optimizer import build_optimizer, ensure_state, learning_rate, set_learning_rate
from tests.kit import jobs
from tests.kit.harness import Ranks

TOTAL, PEAK = 10_000, 2e-3
CPU = torch.device("cpu")


def schedule(name: Any, warmup: int = 1000, decay: int = 4000, floor: float = 0.0) -> ScheduleConfig:
    return ScheduleConfig(name=name, warmup_tokens=warmup, decay_tokens=decay, min_lr=floor)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, PEAK / 1001),  # a first step of rate 0 would be a step thrown away
        (500, PEAK * 501 / 1001),
        (999, PEAK * 1000 / 1001),
        (1000, PEAK),
        (6000, PEAK),
        (6001, PEAK * 3999 / 4000),
        (8000, PEAK / 2),
        (9999, PEAK / 4000),
        (10_000, 0.0),
        (12_000, 0.0),  # the last global batch is rounded up
    ],
)
def test_wsd(tokens: int, expected: float) -> None:
    assert learning_rate(tokens, TOTAL, PEAK, schedule("wsd")) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, PEAK / 1001),
        (1000, PEAK),
        (3250, 1e-4 + (PEAK - 1e-4) * 0.5 * (1 + math.cos(math.pi / 4))),
        (5500, (PEAK + 1e-4) / 2),
        (10_000, 1e-4),
        (12_000, 1e-4),
    ],
)
def test_cosine(tokens: int, expected: float) -> None:
    assert learning_rate(tokens, TOTAL, PEAK, schedule("cosine", floor=1e-4)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("tokens", "expected"), [(0, PEAK / 1001), (1000, PEAK), (9999, PEAK), (12_000, PEAK)])
def test_constant(tokens: int, expected: float) -> None:
    assert learning_rate(tokens, TOTAL, PEAK, schedule("constant")) == pytest.approx(expected, rel=1e-12)


def test_wsd_ends_at_the_floor_and_without_decay_stays_up() -> None:
    rates = [learning_rate(tokens, TOTAL, PEAK, schedule("wsd", floor=1e-4)) for tokens in (6000, 8000, 10_000)]
    assert rates == pytest.approx([PEAK, (PEAK + 1e-4) / 2, 1e-4], rel=1e-12)
    assert learning_rate(10_000, TOTAL, PEAK, schedule("wsd", decay=0)) == PEAK


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_without_warmup_the_first_step_has_the_peak(name: str) -> None:
    assert learning_rate(0, TOTAL, PEAK, schedule(name, warmup=0)) == PEAK


@given(
    name=st.sampled_from(["constant", "cosine", "wsd"]),
    warmup=st.integers(0, 5000),
    decay=st.integers(0, 5000),
    tokens=st.integers(0, 11_000),
)
def test_never_above_the_peak_nor_below_the_floor_and_without_jumps(
    name: str, warmup: int, decay: int, tokens: int
) -> None:
    floor = PEAK / 10
    plan = schedule(name, warmup, decay, floor)
    now, later = (learning_rate(at, TOTAL, PEAK, plan) for at in (tokens, tokens + 1))
    assert 0 < now <= PEAK
    if tokens >= warmup:
        assert later <= now
        assert now >= floor * (1 - 1e-12)
    longest = max(1, min(span for span in (warmup + 1, decay or TOTAL, TOTAL - warmup) if span))
    assert abs(later - now) <= PEAK * 1.6 / longest


def groups(raw: dict[str, Any]) -> tuple[list[tuple[set[str], float]], list[float], tuple[Any, ...]]:
    """Names and weight decay of the optimizer's groups, their rates after `set_learning_rate`, and Adam's settings."""
    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, layer_list

    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    optimizer = build_optimizer(stack, config.optimizer)
    names = {id(parameter): name for name, parameter in canonical_parameters(stack)}
    found = [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]
    settings = tuple(optimizer.defaults[key] for key in ("betas", "eps", "lr"))
    set_learning_rate(optimizer, 0.25)
    return found, [group["lr"] for group in optimizer.param_groups], settings


def test_norms_and_biases_are_not_decayed(one_rank: Ranks) -> None:
    raw = jobs.tiny_config(optimizer={"weight_decay": 0.3, "betas": [0.8, 0.99], "eps": 1e-6, "lr": 0.5})
    ((matrices, decay), (vectors, none)), rates, settings = one_rank.run(groups, raw)[0]
    assert (decay, none, rates, settings) == (0.3, 0.0, [0.25, 0.25], ((0.8, 0.99), 1e-6, 0.5))
    assert vectors == {
        "decoder.final_layernorm.weight",
        "latent_predictor.layer_norm.weight",
        "latent_predictor.layer_norm.bias",
        *(f"decoder.layers.{i}.{n}_layernorm.weight" for i in range(4) for n in ("input", "pre_mlp")),
    }
    assert len(matrices) == 2 + 4 * 4 + 3  # embedding and head, four per layer, the predictor's three
    assert not matrices & vectors


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 5), (7,), (3, 2))]
    for parameter in made[:2]:  # the last one took no part in the step
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def clipped_step(max_norm: float) -> dict[str, Any]:
    """Our norm and the gradients that clipping leaves, with torch's own."""
    ours, theirs = parameters(), parameters()
    norm = math.sqrt(share_of(of_parameters(ours, 0), CPU))
    clip_gradients(ours[:2], norm, max_norm)
    theirs_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
    return {
        "norms": (norm, float(theirs_norm)),
        "gradients": [(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True)],
    }


@pytest.mark.parametrize("max_norm", [0.5, 1e3, 0.0], ids=["clipped", "below", "off"])
def test_norm_and_clipping_are_torchs(max_norm: float, one_rank: Ranks) -> None:
    result = one_rank.run(clipped_step, max_norm)[0]
    assert result["norms"][0] == pytest.approx(result["norms"][1], rel=1e-6)
    for ours, theirs in result["gradients"]:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    untouched = all(torch.equal(p.grad, g) for p, (g, _) in zip(parameters()[:2], result["gradients"], strict=True))
    assert untouched is (max_norm != 0.5)


def test_a_replicated_parameter_counts_once_and_a_tied_copy_never() -> None:
    """A sharded and a replicated gradient as tensor ranks 0 and 1 of one group add them up."""
    sharded, replicated, tied = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
    sharded.grad, replicated.grad, tied.grad = torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([100.0])
    sharded.tensor_model_parallel = True  # type: ignore[attr-defined]
    tied.ds_pipe_replicated = True  # type: ignore[attr-defined]
    everything = [sharded, replicated, tied]
    assert [float(share_of(of_parameters(everything, rank), CPU)) for rank in (0, 1)] == [25.0, 9.0]
    gradients = [p.grad for p in everything]
    assert [float(share_of(of_partition(gradients, everything, rank), CPU)) for rank in (0, 1)] == [25.0, 9.0]


def test_padding_of_a_partition_is_no_parameters_gradient() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    padding = torch.tensor([100.0])
    padding._zero_padding = True  # type: ignore[attr-defined]
    gradients = [torch.tensor([3.0]), padding, None]  # what took no part in the step has none
    assert float(share_of(of_partition(gradients, [first, second], 0), CPU)) == 9.0


def test_squares_are_added_in_float64() -> None:
    gradients = [torch.tensor([1e4, 1e-4])] * 3
    assert float(share_of(gradients, CPU)) == pytest.approx(3e8 + 3e-8, rel=1e-15)


@pytest.mark.parametrize("fused", [True, False])
def test_the_step_count_lies_where_adamw_wants_it(fused: bool) -> None:
    """A fused AdamW counts on the device, and refuses a count on the host."""
    flat = torch.nn.Parameter(torch.zeros(4, device="meta"))
    state = ensure_state(torch.optim.AdamW([flat], fused=fused, foreach=False if not fused else None), flat)
    assert state["step"].device.type == ("meta" if fused else "cpu")
    assert (state["exp_avg"].device.type, state["step"].dtype) == ("meta", torch.float32)


def test_a_rank_without_gradients_has_a_zero_of_its_device() -> None:
    """NCCL takes no tensor of the host."""
    assert share_of([], torch.device("meta")).device.type == "meta"


def test_defaults_are_the_papers() -> None:
    config = OptimizerConfig()
    assert (config.betas, config.weight_decay, config.clip_grad) == ([0.9, 0.95], 0.1, 1.0)
