"""Bad input through the real commands: one sentence on standard error, exit status 2, no traceback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools.text.tokenizer import train_tokenizer
from nextlat_dist.data.shard_format import manifest_bytes
from tests.kit.datasets import FakeTokenizer, write_dataset
from tests.kit.jobs import tiny_config

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path, text_dataset: Path) -> Path:
    """A run of two steps that would work, in a directory of its own."""
    raw = tiny_config(
        model={"vocab_size": 600, "num_layers": 2},
        data={"train": str(text_dataset / "train"), "packing": "pad"},
        training={"train_tokens": 300, "micro_batch_size": 2, "peak_tflops_per_device": 1.0},
    )
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / "run")}))
    return path


def environment() -> dict[str, str]:
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}


def refusal(*arguments: object) -> str:
    """The one sentence with which `nextlat` refuses."""
    result = subprocess.run(
        [sys.executable, "-m", "nextlat_dist.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
        check=False,
    )
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def refused_run(config: Path, *overrides: str) -> str:
    return refusal("train", "--config", config, *overrides)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["objective.horizn=3"], ["unknown config key 'objective.horizn'", "'objective.horizon'"]),
        (["optimizer.lr=high"], ["optimizer.lr is 'high'", "number"]),
        (
            ["parallel.tensor_model_parallel_size=3"],
            ["model.num_attention_heads=4", "parallel.tensor_model_parallel_size=3"],
        ),
        (
            ["parallel.zero_stage=2", "parallel.pipeline_model_parallel_size=2"],
            ["parallel.zero_stage=2", "parallel.pipeline_model_parallel_size=2", "0 or 1"],
        ),
    ],
    ids=["unknown-key", "type", "heads", "zero-pipeline"],
)
def test_configuration(config: Path, overrides: list[str], parts: list[str]) -> None:
    text = refused_run(config, *overrides)
    for part in parts:
        assert part in text


def test_no_such_config(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refused_run(tmp_path / "none.yaml")


def test_batch_arithmetic(config: Path) -> None:
    text = refused_run(config, "training.micro_batch_size=3")
    assert "training.global_batch_size=8 is not a multiple of training.micro_batch_size=3 x 1 data-parallel" in text
    assert not (config.parent / "run").exists()


def test_more_parallel_than_ranks(config: Path) -> None:
    text = refused_run(config, "parallel.tensor_model_parallel_size=2")
    assert text.startswith("1 ranks cannot be divided into groups of parallel.tensor_model_parallel_size=2")


def test_contradicting_deepspeed_setting(config: Path) -> None:
    text = refused_run(config, "deepspeed.gradient_clipping=3")
    assert "deepspeed.gradient_clipping is 3 but optimizer.clip_grad makes it 0.5" in text


def test_missing_data(config: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = refused_run(config, f"data.train={tmp_path / 'empty'}")
    assert f"{tmp_path / 'empty'} is not a finished dataset: it has no manifest.json" in text


def test_missing_validation_data(config: Path, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'} is not a finished dataset" in refused_run(config, f"data.validation={tmp_path}/none")


def test_foreign_manifest(config: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    text = refused_run(config, f"data.train={tmp_path / 'foreign'}")
    assert "foreign/manifest.json is not a manifest written by `nextlat-data shard`" in text


def test_tokenizer_of_another_dataset(config: Path, tmp_path: Path, text_dataset: Path) -> None:
    other = tmp_path / "other.model"
    train_tokenizer(["some other text " * 50], other, vocab_size=290)
    text = refused_run(config, f"data.tokenizer={other}")
    assert f"{text_dataset / 'train'} was made with tokenizer" in text


def test_vocabulary_smaller_than_the_tokenizers(config: Path) -> None:
    text = refused_run(config, "model.vocab_size=599")
    assert "has 600 ids, but the model's vocab_size is 599" in text


def test_token_id_outside_the_vocabulary(config: Path, tmp_path: Path) -> None:
    """The tokenizer of the manifest fits the model, a token in a record does not."""
    manifest = write_dataset(tmp_path / "ids", [np.arange(20, 60), np.array([5, 700, 5])] * 5)
    sha256 = hashlib.sha256(FakeTokenizer.model).hexdigest()
    fits = replace(manifest, tokenizer=replace(manifest.tokenizer, vocab_size=600, sha256=sha256))
    (tmp_path / "ids" / "manifest.json").write_bytes(manifest_bytes(fits))
    text = refused_run(config, f"data.train={tmp_path / 'ids'}")
    assert "token id 700" in text
    assert "600" in text


def test_nothing_to_resume(config: Path, tmp_path: Path) -> None:
    text = refused_run(config, "checkpoint.resume=must")
    assert f"checkpoint.resume=must, but there is no checkpoint under {tmp_path / 'run/checkpoints'}" in text


def test_latest_names_nothing(config: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step_00000005\n")
    text = refused_run(config)
    assert f"{checkpoints / 'latest'} names 'step_00000005', which is not a committed checkpoint" in text
    assert "step_00000005" in refusal("export", "--checkpoint", checkpoints, "--output", tmp_path / "export")


def test_export_without_a_checkpoint(tmp_path: Path) -> None:
    text = refusal("export", "--checkpoint", tmp_path / "none", "--output", tmp_path / "export")
    assert f"there is no checkpoint under {tmp_path / 'none'}" in text
    assert not (tmp_path / "export").exists()


def test_export_of_a_half_written_checkpoint(tmp_path: Path) -> None:
    half = tmp_path / "step_00000004"
    (half / "weights").mkdir(parents=True)
    (half / "weights" / "tp0_pp0.safetensors").write_bytes(b"half")
    text = refusal("export", "--checkpoint", half, "--output", tmp_path / "export")
    assert f"{half} has no manifest.json: it is half-written" in text
    half.rename(tmp_path / "step_00000004.writing")
    text = refusal("export", "--checkpoint", tmp_path / "step_00000004.writing", "--output", tmp_path / "export")
    assert "never committed" in text
    assert not (tmp_path / "export").exists()


def launched(config: Path, *overrides: str) -> str:
    """The one sentence with which two ranks under the launcher refuse."""
    result = subprocess.run(
        ["bash", str(CHECKOUT / "launch" / "single_node.sh"), str(config), *overrides],
        capture_output=True,
        text=True,
        env={**environment(), "NPROC": "2"},
        timeout=240,
        check=False,
    )
    assert result.returncode != 0
    output = result.stdout + result.stderr
    assert "Traceback" not in output, output
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 1, output
    return errors[0]


@pytest.mark.slow
def test_two_ranks_speak_once(config: Path, tmp_path: Path) -> None:
    """Before the ranks meet, when only a reader sees it, and when all see it."""
    assert "unknown config key 'modle'" in launched(config, "modle.num_layers=1")
    assert "2 data-parallel ranks" in launched(config, "training.micro_batch_size=8")
    assert "is not a finished dataset" in launched(config, f"data.train={tmp_path}")
    assert "checkpoint.resume=must" in launched(config, "checkpoint.resume=must")
