"""Costs of steps: what is measured, and against what."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nextlat_dist.evaluation.speculative import step_costs as costs
from nextlat_dist.evaluation.speculative.step_costs import StepCosts, costs_sentence, measure_costs, split_cycles
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.loading import load
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export

PROMPT = list(range(3, 23))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    config = tiny_config()
    predictor = random_predictor(config.hidden_size)
    return load(write_export(tmp_path_factory.mktemp("export"), config, random_weights(config), predictor))


def test_units() -> None:
    measured = StepCosts(4, 0.001, {1: 0.01, 3: 0.015})
    assert measured.draft == pytest.approx(0.1)
    assert measured.verify == pytest.approx({1: 1.0, 3: 1.5})
    assert StepCosts(4, None, {1: 0.01}).draft is None
    assert measured.named("b4_") == pytest.approx(
        {"b4_plain_step_seconds": 0.01, "b4_draft_cost": 0.1, "b4_verify_cost_1": 1.0, "b4_verify_cost_3": 1.5}
    )
    assert StepCosts(4, None, {1: 0.01}).named() == {"plain_step_seconds": 0.01, "verify_cost_1": 1.0}
    assert costs_sentence(measured.to_json()) == "batch 4: plain step 10.00 ms; draft step c = 0.100; v(3) = 1.50"


def test_what_is_timed(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every number stands for: widths and positions of forwards, and a chain of draft steps counted as one."""
    forwards: list[tuple[list[int], list[int]]] = []
    original = decoder.llama.forward

    def forward(tokens: torch.Tensor, counts: list[int], cache: Any) -> torch.Tensor:
        forwards.append((list(counts), list(cache.lengths)))
        return original(tokens, counts, cache)

    steps = []
    memory_type = type(decoder.drafter.start(1, 8))  # type: ignore[union-attr]
    original_logits = memory_type.logits

    def logits(self: Any, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        steps.append(len(tokens))
        result: torch.Tensor = original_logits(self, tokens, kept)
        return result

    monkeypatch.setattr(decoder.llama, "forward", forward)
    monkeypatch.setattr(memory_type, "logits", logits)
    clock = itertools.count()
    monkeypatch.setattr(costs.time, "perf_counter", lambda: float(next(clock)))
    measured = measure_costs(decoder, PROMPT, 3, [4, 2], rounds=2)
    # Every step takes one second by this clock; the draft steps share theirs.
    assert measured == StepCosts(3, 1 / costs.CHAIN, {1: 1.0, 2: 1.0, 4: 1.0})
    rounds = costs.WARM_UP_ROUNDS + 2
    positions = [20, 19, 18]  # rows stand apart, as in a real batch
    assert forwards[1:] == [([n] * 3, positions) for n in (1, 2, 4)] * rounds
    assert steps == [3] * costs.CHAIN * rounds


def test_a_drafter_that_ends_early_and_a_base_without(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(costs.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(decoder.drafter, "longest", 2)
    assert measure_costs(decoder, PROMPT, 1, [], rounds=1) == StepCosts(1, 0.5, {1: 1.0})
    monkeypatch.setattr(decoder, "drafter", None)
    assert measure_costs(decoder, PROMPT, 1, [2], rounds=1) == StepCosts(1, None, {1: 1.0, 2: 1.0})


def test_cycles_are_split(decoder: Decoder) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    split = split_cycles(decoder, [PROMPT, PROMPT[:4]], draft_length=2, **options)
    alone = decoder.generate([PROMPT, PROMPT[:4]], draft_length=2, ignore_eos=True, **options)
    assert split.cycles == max(row.cycles for row in alone)
    shares = split.to_json()
    assert 0 < shares["draft_share"] < 1
    assert 0 < shares["verify_share"] < 1
    assert shares["overhead_share"] == pytest.approx(1 - shares["draft_share"] - shares["verify_share"])
    assert shares["overhead_share"] > 0
    assert shares["milliseconds_per_cycle"] == pytest.approx(split.seconds / split.cycles * 1e3)
