"""`nextlat train` in an output_dir where a run lives: one sentence, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

from nextlat_dist.checkpoint.run_lock import take_lock
from tests.kit.training.runs import training_config


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_is_refused_and_leaves_the_folder_as_it_is(tmp_path: Path, text_dataset: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text("{}\n")
    raw = training_config(output, text_dataset, {"zero_stage": 1}, {})
    raw["training"]["train_tokens"] = 4 * 48  # a step
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "nextlat_dist.cli", "train", "--config", str(tmp_path / "run.yaml")]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NEXTLAT_LAUNCH", "NEXTLAT_LAUNCHER")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}
    lock = take_lock(output, beat_seconds=1000)
    try:
        before = content(output)
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == 2, ended.stderr
        errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, ended.stderr
        assert f"output_dir={output} is in use by the run on host" in errors[0]
        assert f"pid {os.getpid()}" in errors[0]
        assert content(output) == before
    finally:
        lock.release()
