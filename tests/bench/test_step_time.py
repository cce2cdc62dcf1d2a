"""The benchmarks of losses and training steps measure what they say. What the numbers are is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.bench import step_time
from nextlat_dist.bench.step_time import QUICK, OurStep, TransformersStep, config_of, time_ratio
from nextlat_dist.bench.timing import Rates
from nextlat_dist.plan.counting import flops_per_token
from tests.kit.harness import Ranks

SUMMARIES = {
    "step_time": {
        *(
            f"{kind}_ratio_{case}"
            for kind in ("step", "flop")
            for case in ("d1", "d2", "d8", "mtp2", "jtp2", "bst", "d2_detached")
        ),
        "unfused_over_fused_gpt",
        "gpt_over_transformers",
    },
    "objective": {
        *(f"unfused_over_fused_d{d}" for d in (0, 1, 2)),
        "attention_over_documents_128",
        "loss_peak_gb_1024_d0",
    },
}


@pytest.mark.parametrize("name", SUMMARIES)
def test_quick_run(name: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", f"nextlat_dist.bench.{name}", "--quick", "--json", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(file.read_text())
    assert set(report["summary"]) == SUMMARIES[name]
    assert all(value > 0 for value in report["summary"].values())
    assert f"{next(iter(report['summary']))} = " in ended.stdout
    if name == "step_time":
        ratios = [report["summary"][f"flop_ratio_{case}"] for case in ("d1", "d2", "d8")]
        assert 1 < ratios[0] < ratios[1] < ratios[2]
        parameters = {row["step"]: row["parameters"] for row in report["rows"]}
        assert parameters["GPT"] < parameters["JTP, d = 2"] < parameters["BST, 1 % of pairs"]


def test_ratios_are_of_times_and_sides_are_what_they_say() -> None:
    one, other = Rates((1.0,), (2.0,)), Rates((10.0,), (8.0,))
    assert (time_ratio(one, other, True), time_ratio(one, other, False)) == (4, 10)
    assert not config_of(QUICK, {"name": "next_token"}, 256, fused=False).training.fused_losses
    assert config_of(QUICK, {"name": "next_token"}, 256).training.fused_losses


def test_full_run_has_the_shapes_that_are_promised() -> None:
    sizes = step_time.StepSizes()
    assert (sizes.num_layers, sizes.hidden_size, sizes.vocab_size, sizes.predictor_hidden_size) == (8, 256, 50304, 768)
    assert (sizes.sequence_length, sizes.document_tokens, sizes.small_vocab_size) == (512, 500, 8192)
    paper = config_of(step_time.OF_1P3B, {"name": "nextlat", "horizon": 1}, 50304)
    assert (paper.model.num_layers, paper.model.hidden_size, paper.model.ffn_size) == (22, 2048, 5504)


def steps_of_both() -> dict[str, Any]:
    """Losses of the first steps, and parameters, of our step and of the one with transformers."""
    config = config_of(QUICK, {"name": "next_token"}, QUICK.small_vocab_size)
    ours, theirs = OurStep(config, QUICK.document_tokens), TransformersStep(config)
    before, own = ([p.detach().clone() for p in m.parameters()] for m in (theirs._model, ours._engine.module))
    tokens = ours(), theirs()
    rows = [QUICK.document_tokens, QUICK.sequence_length - QUICK.document_tokens]  # documents of each
    attended = sum(n * (n + 1) / 2 for n in rows) / QUICK.sequence_length
    return {
        "tokens": tokens,
        "sizes": [sum(p.numel() for p in model.parameters()) for model in (ours._engine.module, theirs._model)],
        "moved": all(
            not p.equal(q)
            for model, old in ((theirs._model, before), (ours._engine.module, own))
            for p, q in zip(old, model.parameters(), strict=True)
        ),
        "flops": (ours.flops(), ours.tokens * flops_per_token(config, attended)),
        "gradients": [p.grad is None for p in theirs._model.parameters()],
    }


def test_both_sides_do_the_same_work(one_rank: Ranks) -> None:
    (found,) = one_rank.run(steps_of_both)
    assert found["tokens"] == (QUICK.rows * QUICK.sequence_length,) * 2
    assert found["sizes"][0] == found["sizes"][1]
    assert found["moved"]
    assert found["flops"][0] == pytest.approx(found["flops"][1])
    assert all(found["gradients"])
