"""A whole run on real text: it learns, logs every term, validates, and writes a real offline wandb run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config

FROM_PYTHON = """
import gc, json, logging, os, sys, warnings
from pathlib import Path
import torch

def seen():
    return [
        torch.cuda.current_device, torch.cuda.synchronize, list(warnings.filters), logging.getLogger("DeepSpeed").level
    ]

before = seen()
from nextlat_dist import train
from nextlat_dist.config import load_config
result = train(load_config(Path(sys.argv[1])))
print("RESULT", json.dumps([
    str(result.run_directory), str(result.checkpoints), result.steps, result.tokens, result.stopped, result.metrics,
    [one == other for one, other in zip(before, seen())], torch.distributed.is_initialized(), os.environ["MASTER_PORT"],
    sum(isinstance(found, torch.nn.Parameter) for found in gc.get_objects()),
]))
"""


def _config(output: Path, dataset: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    raw = training_config(output, dataset, {"zero_stage": 1}, {"micro_batch_size": 2, "log_interval": 5})
    raw["training"]["train_tokens"] = 40 * 4 * 48
    raw["optimizer"] = {"lr": 5e-3, "clip_grad": 1.0}
    raw["checkpoint"] = {"save_interval": 0}
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


def test_a_lambda_follows_its_schedule(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    """The logged loss is made of the terms with the weights of the step; the predictor rests while they are 0."""
    step = 4 * 48
    schedule = {"lambda_hidden": [[2 * step, 0], [4 * step, 4]], "lambda_kl": [[0, 0]]}
    raw = training_config(tmp_path, text_dataset, {"zero_stage": 1}, {"micro_batch_size": 2})
    one_rank.run(run_training, {**raw, "objective": {"horizon": 1, "lambda_schedule": schedule}})
    for number, line in logged(tmp_path).items():
        weight = {4: 2.0, 5: 4.0, 6: 4.0}.get(number, 0.0)
        assert line["loss"] == pytest.approx(line["next_token"] + weight * line["hidden"], rel=1e-6), number
        assert line["hidden"] > 0
    assert len(logged(tmp_path)) == 6


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_training_lowers_every_reported_loss(
    packing: str, tmp_path: Path, text_dataset: Path, two_ranks: Ranks
) -> None:
    two_ranks.run(run_training, _config(tmp_path, text_dataset, data={"packing": packing}))
    lines = logged(tmp_path)
    assert sorted(lines) == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert lines[40]["loss"] < 0.85 * lines[1]["loss"]
    assert lines[40]["next_token"] < 0.9 * lines[1]["next_token"]
    for line in lines.values():
        # lambda_hidden 0.7 and lambda_kl 1.3, as in the configuration
        assert line["loss"] == pytest.approx(line["next_token"] + 0.7 * line["hidden"] + 1.3 * line["kl"], rel=1e-9)
        assert line["gradient_norm"] > 0
        assert line["tokens"] == line["step"] * 4 * 48
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 40
    assert last["validation_next_token"] < 0.99 * lines[1]["next_token"]


def test_logged_losses_are_means_since_the_last_line(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    found = []
    for interval in (1, 5):
        raw = _config(tmp_path / str(interval), text_dataset)
        raw["training"] |= {"log_interval": interval, "train_tokens": 10 * 4 * 48}
        one_rank.run(run_training, raw)
        found.append({step: line["next_token"] for step, line in logged(tmp_path / str(interval)).items()})
    every, fifth = found
    assert sorted(fifth) == [1, 5, 10]
    assert fifth[1] == every[1]
    last, whole = (sum(every[step] for step in range(first, 11)) / (11 - first) for first in (6, 1))
    # Steps weigh by their loss tokens, which differ a little; including the first five steps would differ by far more.
    assert abs(fifth[10] - last) < 0.1 * abs(whole - last)
    assert abs(fifth[10] - last) < 0.1 * abs(every[10] - last)


def test_validation_does_not_depend_on_the_layout(
    tmp_path: Path, text_dataset: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    found = []
    for name, ranks, parallel in (
        ("one", one_rank, {"zero_stage": 0}),
        ("pipeline", two_ranks, {"pipeline_model_parallel_size": 2, "zero_stage": 1}),
        ("data", two_ranks, {"zero_stage": 3}),
    ):
        raw = _config(tmp_path / name, text_dataset)
        raw["parallel"] = parallel
        raw["training"]["train_tokens"] = 2 * 4 * 48
        ranks.run(run_training, raw)
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        found.append({key: value for key, value in last.items() if key.startswith("validation_")})
    assert len(found[0]) == 4
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_offline_wandb_run_is_written_and_continued(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    raw = _config(tmp_path, text_dataset, wandb={"mode": "offline", "project": "test"})
    raw["training"]["train_tokens"] = 10 * 4 * 48
    one_rank.run(run_training, raw)
    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"next_token" in file.read_bytes()
    state = json.loads((tmp_path / "checkpoints/step_00000010/trainer_state.json").read_text())
    assert state["wandb_id"]
    assert state["wandb_id"] in file.name

    raw["training"]["train_tokens"] = 15 * 4 * 48
    one_rank.run(run_training, raw)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 or files == [file]
    assert all(state["wandb_id"] in path.name for path in files)


def test_from_python_a_result_comes_back_and_torch_is_as_before(tmp_path: Path, text_dataset: Path) -> None:
    raw = _config(tmp_path / "run", text_dataset)
    raw["training"] |= {"train_tokens": 2 * 4 * 48, "log_interval": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-c", FROM_PYTHON, str(tmp_path / "run.yaml")]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    extensions = tmp_path / "extensions"
    environment |= {"TORCH_EXTENSIONS_DIR": str(extensions), "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout.split("RESULT ")[1])
    run, checkpoints, steps, tokens, stopped, metrics, same, met, port, parameters = answer
    assert (run, checkpoints) == (str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints"))
    assert (steps, tokens, stopped, same, met) == (2, 2 * 4 * 48, False, [True] * 4, False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged_terms = {**lines[-2], **lines[-1]}
    assert metrics == {name: logged_terms[name] for name in metrics}
    assert parameters == 0, "the model is freed"
    assert not extensions.exists(), "no extension is compiled or looked for"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "nothing is left there"
    assert not (tmp_path / "run" / "run.lock").exists()
    assert not list(tmp_path.rglob("step_*/run.lock"))
    assert {"loss", "hidden", "kl", "next_token", "validation_loss"} <= metrics.keys()
