"""`nextlat checkpoint` on the checkpoints of a real run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, TensorReader
from nextlat_dist.cli import main
from tests.kit.harness import Ranks
from tests.kit.training.runs import logged, run_training, training_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_dataset: Path, two_ranks: Ranks) -> Path:
    """A finished run of two tensor-parallel ranks with checkpoints 2, 4 and 6; not to be changed."""
    output = tmp_path_factory.mktemp("run")
    two_ranks.run(run_training, config(output, text_dataset, {"tensor_model_parallel_size": 2, "zero_stage": 1}))
    return output


def config(output: Path, dataset: Path, parallel: dict[str, int]) -> dict[str, Any]:
    raw = training_config(output, dataset, parallel, {})
    return {**raw, "checkpoint": {"save_interval": 2, "keep_last": 3}}


@pytest.fixture
def checkpoints(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")


def command(*arguments: object) -> int:
    try:
        return main(["checkpoint", *map(str, arguments)])
    except SystemExit as left:
        return int(str(left.code))


def test_list(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoints / "step_00000008.writing").mkdir()
    assert command("list", checkpoints) == 0
    head, *lines, abandoned = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step_00000002", "step_00000004", "step_00000006"]
    assert all("tensor 2 x pipeline 1 x data 1, ZeRO 1" in line for line in lines)
    assert [line.endswith("latest") for line in lines] == [False, False, True]
    assert "step_00000008.writing: never committed" in abandoned
    assert head.startswith("checkpoint")


def test_verify_names_every_damage(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("verify", checkpoints) == 0
    assert capsys.readouterr().out.count("whole") == 3
    for number in (2, 4):
        path = next((checkpoints / f"step_0000000{number}" / "weights").iterdir())
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    (checkpoints / "latest").write_text("step_00000009\n")
    assert command("verify", checkpoints) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["step_00000002", "step_00000004", "step_00000006"]
    assert ["does not match its sha256" in line for line in lines] == [True, True, False, False]
    assert "names 'step_00000009', which is not a committed checkpoint" in lines[3]
    assert command("verify", checkpoints / "step_00000006") == 0


def test_prune(checkpoints: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("prune", checkpoints, "--keep-last", 1, "--keep-every", 4) == 0
    assert capsys.readouterr().out.split() == [
        "step_00000002:", "deleted", "step_00000004:", "kept", "step_00000006:", "kept",
    ]  # fmt: skip
    assert command("verify", checkpoints) == 0


def test_prune_deletes_nothing_while_the_newest_is_damaged(
    checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    next((checkpoints / "step_00000006" / "optimizer").iterdir()).unlink()
    assert command("prune", checkpoints, "--keep-last", 1) == 2
    assert "is half-written" in capsys.readouterr().err
    assert len(list(checkpoints.glob("step_*"))) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["list"], "holds no checkpoint"),
        (["verify"], "holds no checkpoint"),
        (["prune", "--keep-last", "1"], "has no file 'latest'"),
        (["prune", "--keep-last", "0"], "--keep-last is 0"),
        (["reshape", "--output", "somewhere"], "holds no checkpoint"),
    ],
)
def test_nothing_there_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what, *options = arguments
    assert command(what, tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_reshape_keeps_every_number_and_can_be_resumed(
    run: Path, checkpoints: Path, tmp_path: Path, text_dataset: Path, one_rank: Ranks, two_ranks: Ranks
) -> None:
    output = tmp_path / "one" / "checkpoints"
    assert command("reshape", checkpoints / "step_00000004", "--output", output) == 0
    with TensorReader(checkpoints / "step_00000004") as before, TensorReader(output / "step_00000004") as after:
        assert before.names == after.names
        for name in before.names:
            for key in (WEIGHT, *MOMENTS):
                assert torch.equal(before.full(name, key), after.full(name, key))
    assert len(list((output / "step_00000004" / "weights").iterdir())) == 1
    assert json.loads((output / "step_00000004" / "manifest.json").read_text())["topology"]["tensor"] == 1
    assert command("reshape", checkpoints, "--output", output) == 2  # not empty
    one_rank.run(run_training, config(tmp_path / "one", text_dataset, {"zero_stage": 0}))
    expected, found = logged(run), logged(tmp_path / "one")
    for step in (5, 6):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
