"""Step n is taken with the rate that belongs to the tokens before it: to the bit, in the optimizer and in the log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.training.engine.optimizer import learning_rate
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

ROWS, LENGTH, STEPS, PEAK = 4, 48, 6, 3e-3
STEP_TOKENS = ROWS * LENGTH
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"name": "cosine", "warmup_tokens": 2 * STEP_TOKENS, "min_lr": 1e-4},
    "wsd": {"name": "wsd", "warmup_tokens": 2 * STEP_TOKENS, "decay_tokens": 3 * STEP_TOKENS},
}


def rates_of_the_optimizer(raw: dict[str, Any]) -> list[list[float]]:
    """For every call of the plain optimizer's step, the rate of each of its groups."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[list[float]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append([g["lr"] for g in optimizer.param_groups])
    )
    try:
        run_training(raw)
    finally:
        hook.remove()
    return seen


def configured(output: Path, dataset: Path, schedule: str, steps: int = STEPS, stage: int = 0) -> dict[str, Any]:
    training = {"train_tokens": steps * STEP_TOKENS, "validation_batches": 0}
    raw = training_config(output, dataset, {"zero_stage": stage}, training)
    return raw | {"schedule": SCHEDULES[schedule], "optimizer": {"lr": PEAK, "clip_grad": 1.0}}


def expected(schedule: str) -> list[float]:
    """By hand: (tokens + 1) / (warm-up + 1) of the peak, then down; each step begins STEP_TOKENS after the last."""
    warmup = 2 * STEP_TOKENS
    first = [PEAK * (done * STEP_TOKENS + 1) / (warmup + 1) for done in (0, 1)]
    if schedule == "wsd":
        return [*first, PEAK, *(PEAK * left / 3 for left in (3, 2, 1))]
    return [*first, *(1e-4 + (PEAK - 1e-4) * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4))]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_is_taken_with_the_rate_of_the_tokens_before_it(
    schedule: str, tmp_path: Path, text_dataset: Path, one_rank: Ranks
) -> None:
    raw = configured(tmp_path, text_dataset, schedule)
    taken = one_rank.run(rates_of_the_optimizer, raw)[0]
    plan = config_from_dict(raw)
    exact = [
        learning_rate(step * STEP_TOKENS, plan.training.train_tokens, PEAK, plan.schedule) for step in range(STEPS)
    ]
    assert exact == pytest.approx(expected(schedule), rel=1e-12)
    assert len(set(exact)) >= STEPS - 1, "a rate that stays the same shows nothing"
    assert taken == [[rate] * 2 for rate in exact]
    assert [line["learning_rate"] for line in logged(tmp_path).values()] == exact


def test_zero_and_a_resume_take_them_too(tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    """ZeRO 2 steps each group of parameters in a call of its own; the resume begins at step 4."""
    raw = configured(tmp_path, text_dataset, "cosine", stage=2)
    before = two_ranks.run(rates_of_the_optimizer, raw)[0]
    root = tmp_path / "checkpoints"
    (root / "latest").write_text("step_00000003\n")
    for file in (root / "step_00000006").rglob("*"):
        file.is_file() and file.unlink()  # type: ignore[func-returns-value]
    whole = logged(tmp_path)
    after = two_ranks.run(rates_of_the_optimizer, raw)[0]
    assert before[0] == [whole[1]["learning_rate"]] * len(before[0])
    assert after == before[len(before) // 2 :]
    assert logged(tmp_path) == whole
    assert json.loads((root / "step_00000006" / "trainer_state.json").read_text())["step"] == STEPS
