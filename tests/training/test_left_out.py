"""Reports of what the weights never see: steps whose batch has no target, and what `packing: pad` cuts off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.checkpoint.tensors import MOMENTS, TensorReader
from nextlat_dist.config.load import config_from_dict
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.evaluation.run_report.merge import merge_run
from nextlat_dist.training.engine.optimizer import learning_rate
from nextlat_dist.training.health.guards import NO_TARGETS
from tests.kit.datasets import tiny_tokenizer, write_dataset
from tests.kit.harness import Ranks
from tests.kit.training.runs import run_training, training_config

ROWS, LENGTH = 4, 48
ROW = LENGTH + 1
STEP_TOKENS = ROWS * LENGTH


def dataset(directory: Path, lengths: list[int], prompts: list[int]) -> Path:
    """Documents of these lengths, of each so many leading tokens that are no target."""
    documents = [10 + np.arange(length) % 500 for length in lengths]
    tokenizer = Tokenizer(tiny_tokenizer())
    write_dataset(directory, documents, prompts=prompts, tokenizer=tokenizer, shard_tokens=100_000)
    return directory


def configured(output: Path, train: Path, steps: int, **data: Any) -> dict[str, Any]:
    training = {"train_tokens": steps * STEP_TOKENS, "validation_batches": 1}
    raw = training_config(output, train.parent, {"zero_stage": 0}, training)
    raw["model"] |= {"num_layers": 1}
    raw["data"] |= {"train": str(train), "validation": str(train), "shuffle": False, **data}
    return raw | {"checkpoint": {"save_interval": 0}}


def lines(output: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (output / "metrics.jsonl").read_text().splitlines()]


def state(output: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "checkpoints" / f"step_{step:08d}" / "trainer_state.json").read_text())
    return found


def test_a_step_without_a_target_is_not_applied_and_says_so(tmp_path: Path, one_rank: Ranks) -> None:
    """Two batches of prompts alone, then two with answers; the validation batch is the first of them."""
    prompts = [ROW] * (2 * ROWS) + [5] * (2 * ROWS)
    raw = configured(tmp_path / "run", dataset(tmp_path / "data", [ROW] * (4 * ROWS), prompts), 4)
    raw |= {"schedule": {"name": "cosine", "warmup_tokens": 300}, "guards": {"max_bad_steps": 1}}
    one_rank.run(run_training, raw)
    found = lines(tmp_path / "run")
    steps = {line["step"]: line for line in found if "loss" in line}
    for step in (1, 2):
        nothing = ("loss", "next_token", "hidden", "kl", "gradient_norm", "learning_rate")
        assert [steps[step][name] for name in nothing] == [None] * 6
        assert steps[step]["steps_without_targets"] == 1
    assert all(steps[step]["loss"] > 0 and "steps_without_targets" not in steps[step] for step in (3, 4))

    plan = config_from_dict(raw)
    rates = [learning_rate(n * STEP_TOKENS, 4 * STEP_TOKENS, plan.optimizer.lr, plan.schedule) for n in (2, 3)]
    assert [steps[step]["learning_rate"] for step in (3, 4)] == rates, "the schedule counts the rows that were read"

    skipped = [line["skipped_step"] for line in found if "skipped_step" in line]
    assert [(event["reason"], event["loss"], event["rows"]) for event in skipped] == [
        (NO_TARGETS, None, [0, 4]),
        (NO_TARGETS, None, [4, 8]),
    ]
    saved = state(tmp_path / "run", 4)
    assert (saved["skipped"], saved["optimizer_step"], saved["bad_steps"]) == ([[0, 8]], 2, 0)
    (validation,) = [line for line in found if "validation_loss" in line]
    assert [validation[f"validation_{term}"] for term in ("loss", "next_token", "kl")] == [None] * 3
    summary = merge_run(tmp_path / "run").content["train"]
    assert (summary["steps_without_targets"], summary["loss_first"]) == (2, steps[3]["loss"])


def test_a_run_without_one_target_leaves_its_weights_alone(tmp_path: Path, two_ranks: Ranks) -> None:
    """More such steps in a row than bad ones are allowed: nothing is wrong with the weights, so nothing is rewound."""
    raw = configured(tmp_path / "run", dataset(tmp_path / "data", [ROW] * 8, [ROW] * 8), 12)
    raw |= {"parallel": {"zero_stage": 1}, "optimizer": {"weight_decay": 0.5}}
    raw |= {"checkpoint": {"save_interval": 1, "keep_last": 12}}
    raw["training"] |= {"precision": "bf16"}
    two_ranks.run(run_training, raw)
    root = tmp_path / "run" / "checkpoints"
    assert state(tmp_path / "run", 12)["optimizer_step"] == 0
    with TensorReader(root / "step_00000001") as first, TensorReader(root / "step_00000012") as last:
        for name in first.names:
            assert first.full(name).equal(last.full(name)), name
            assert not any(last.full(name, key).any() for key in MOMENTS), name


def test_documents_that_pad_cuts_are_counted(tmp_path: Path, one_rank: Ranks) -> None:
    """Rows of 49: of the documents of 49, 20, 149 and 69 tokens, the last two are cut, by 100 and 20 tokens of 287."""
    lengths = [ROW, 20, 149, 69] * 2
    raw = configured(tmp_path / "run", dataset(tmp_path / "data", lengths, [1] * 8), 3, packing="pad")
    one_rank.run(run_training, raw)
    found = lines(tmp_path / "run")
    cut = {"cut_documents": 2, "cut_documents_share": 0.5, "cut_tokens_share": pytest.approx(120 / 287)}
    for line in found:
        if "loss" in line:
            assert {key: line[key] for key in cut} == cut
    first, last = [line for line in found if "warning" in line]
    assert (first["step"], first["warning"]) == (1, {"cut_in": "this batch", **cut})
    assert (last["step"], last["warning"]) == (3, {"cut_in": "all batches", **cut, "cut_documents": 6})
    report = merge_run(tmp_path / "run")
    assert {key: report.content["train"][key] for key in cut} == {**cut, "cut_documents": 6}
    assert "**Cut by `packing: pad`:** 6 documents (50.0%), with 41.8% of all tokens." in report.page


def test_nothing_is_said_where_nothing_is_cut(tmp_path: Path, one_rank: Ranks) -> None:
    raw = configured(tmp_path / "run", dataset(tmp_path / "data", [ROW, 20] * 4, [1] * 8), 1, packing="pad")
    one_rank.run(run_training, raw)
    assert not [line for line in lines(tmp_path / "run") if "warning" in line]
    assert [line["cut_documents"] for line in lines(tmp_path / "run") if "loss" in line] == [0]
