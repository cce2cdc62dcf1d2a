"""The scripts of examples/ run as they stand, and stay short."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import run
from tests.kit.datasets import tiny_tokenizer
from tests.kit.pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_has_less_than_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
    assert f"python examples/{example.name}" in example.read_text()


def test_train_export_and_decode_from_python(tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = run(tmp_path, "python", str(ROOT / "examples/train_and_export.py"), str(output))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["next_token"] for line in lines if "next_token" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    [last] = re.findall(r"^8 steps, last loss (.*)$", said, flags=re.MULTILINE)
    assert float(last) == pytest.approx([line["loss"] for line in lines if "loss" in line][-1], abs=5e-4)
    assert (output / "export/latent_predictor/model.safetensors").is_file()

    printed = run(tmp_path, "python", str(ROOT / "examples/decode.py"), str(output / "export"), "def ", "import ")
    batch, _, stream = printed.partition("the first again, greedy, cycle by cycle:\n")
    assert batch.count("drafted tokens accepted") == 2
    assert stream.count("of them drafted") >= 32 / 4


def test_an_objective_of_ones_own_trains(tmp_path: Path) -> None:
    documents = tmp_path / "texts.jsonl"
    documents.write_text(
        "".join(json.dumps({"text": f"{i} green bottles on the wall, " * 9}) + "\n" for i in range(60))
    )
    shard = ["nextlat-data", "shard", "--input", str(documents), "--tokenizer", str(tiny_tokenizer())]
    run(tmp_path, *shard, "--output", "data")
    example = str(ROOT / "examples/custom_objective.py")
    run(tmp_path, "python", example, "data", "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len(losses) == 8
    for line in losses:
        assert line["smooth"] > 0
        assert line["loss"] == pytest.approx(line["next_token"] + 0.1 * line["smooth"], rel=1e-9)

    # What a checkpoint names is imported only where the user names it too.
    export = [
        sys.executable,
        "-m",
        "nextlat_dist.cli",
        "export",
        "--checkpoint",
        "run/checkpoints",
        "--output",
        "export",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    refused = subprocess.run(export, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--allow-import custom_objective:SMOOTH" in refused.stderr
    assert not (tmp_path / "export").exists()
    allowed = [*export, "--allow-import", "custom_objective:SMOOTH"]
    subprocess.run(allowed, cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / "export/model.safetensors").is_file()
