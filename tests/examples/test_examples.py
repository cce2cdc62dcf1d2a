"""The scripts of examples/ run as they stand, and stay short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.commands import run
from tests.kit.pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_has_less_than_forty_lines(example: Path) -> None:
    assert len(example.read_text().splitlines()) < 40
    assert f"python examples/{example.name}" in example.read_text()


def test_train_export_and_decode_from_python(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(tmp_path, "python", str(ROOT / "examples/train_and_export.py"), str(output))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [line["next_token"] for line in lines if "next_token" in line]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert (output / "export/latent_predictor/model.safetensors").is_file()

    printed = run(tmp_path, "python", str(ROOT / "examples/decode.py"), str(output / "export"), "def ", "import ")
    batch, _, stream = printed.partition("the first again, greedy, cycle by cycle:\n")
    assert batch.count("drafted tokens accepted") == 2
    assert stream.count("of them drafted") >= 32 / 4
