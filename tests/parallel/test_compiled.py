"""Compiled pieces do what they do uncompiled, and are compiled in the first steps only."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from nextlat_dist.parallel import compiled
from nextlat_dist.parallel.compiled import compiled_pieces, compiling, piece
from tests.kit import jobs
from tests.kit.harness import Ranks

CPU = torch.device("cpu")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "gpt": {"name": "next_token"},
    "nextlat": {"name": "nextlat", "horizon": 2},
    "mtp": {"name": "mtp", "horizon": 2},
    "jtp": {"name": "jtp", "horizon": 2},
}


def steps(objective: dict[str, Any], recompute: str, backend: str, seeds: list[int]) -> list[dict[str, float]]:
    """Of each batch, the largest relative error of a gradient with compiled pieces, and how many graphs there are."""
    from torch._dynamo.utils import counters

    from nextlat_dist.model.initialize import canonical_parameters
    from nextlat_dist.model.layer_list import LayerStack, initialize, layer_list
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import term_counts, term_weights

    raw = jobs.tiny_config(objective=objective, training={"recompute": recompute})
    config, dims = jobs.set_up(raw)
    stack = LayerStack(layer_list(config, dims, torch.float32))
    initialize(stack, config, dims)

    def gradients(seed: int) -> dict[str, torch.Tensor]:
        rows = jobs.ragged_rows(4, seed=seed)
        set_term_weights(stack, term_weights(term_counts(rows, config.objective), config.objective))
        stack.zero_grad()
        stack(rows.message).loss.backward()
        return {name: p.grad.clone() for name, p in canonical_parameters(stack) if p.grad is not None}

    expected = {seed: gradients(seed) for seed in seeds}
    found = []
    with pytest.MonkeyPatch.context() as patch, compiled_pieces("always", CPU):
        patch.setattr(compiled, "BACKEND", backend)
        for seed in seeds:
            errors = [_error(gradient, expected[seed][name]) for name, gradient in gradients(seed).items()]
            found.append({"error": max(errors), "graphs": counters["stats"]["unique_graphs"]})
    return found


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_compiles_in_its_first_steps_only(objective: str, one_rank: Ranks) -> None:
    """Batches of other documents, masks and numbers of rows that count."""
    (found,) = one_rank.run(steps, OBJECTIVES[objective], "selective", "eager", list(range(8)))
    assert found[0]["graphs"] > 3
    assert found[7]["graphs"] == found[1]["graphs"]
    # Gradients of Fetch lie behind a layer normalisation, where roundings add up.
    assert max(step["error"] for step in found) < (4e-6 if objective == "jtp" else 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_compiled_for_a_cpu_is_the_same(objective: str, one_rank: Ranks) -> None:
    (found,) = one_rank.run(steps, OBJECTIVES[objective], "none", "inductor", list(range(5)))
    assert found[4]["graphs"] == found[1]["graphs"] > 3
    # Gradients of Fetch lie behind a layer normalisation, where roundings add up.
    assert max(step["error"] for step in found) < (4e-6 if objective == "jtp" else 1e-6)


@piece
def half(values: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return values / 2, torch.compiler.is_compiling()


@pytest.mark.parametrize(("wanted", "expected"), [("always", True), ("auto", False), ("never", False)])
def test_auto_compiles_on_a_gpu_alone(wanted: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    with compiled_pieces(wanted, CPU):
        assert compiling() is expected
        assert half(torch.ones(3))[1] is expected
    assert not compiling()


def test_auto_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "no such backend")
    assert not compiled._compiler_works(CPU)
    assert "training.compile=auto: torch.compile does not work here" in caplog.text
