"""`nextlat` as a user types it: the dry run of the paper's configuration, help, arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nextlat_dist
from nextlat_dist.cli import _parser, main
from nextlat_dist.config import config_from_dict, load_config
from tests.kit.parsers import leaves, undescribed

CHECKOUT = Path(__file__).parents[1]
PAPER = CHECKOUT / "configs" / "fineweb_edu_1p3b.yaml"


def dry_run(tmp_path: Path, *overrides: str, ranks: str | None = None) -> tuple[int, list[str], str]:
    """Exit status, lines on standard output and standard error of a dry run far from any data."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-m", "nextlat_dist.cli", "train", "--config", str(PAPER), "--dry-run", *overrides],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(CHECKOUT), **({"WORLD_SIZE": ranks} if ranks else {})},
        timeout=240,
        check=False,
    )
    assert list(tmp_path.iterdir()) == []  # nothing is built, nothing is written
    return result.returncode, result.stdout.splitlines(), result.stderr


def test_dry_run_of_the_papers_run(tmp_path: Path) -> None:
    status, lines, errors = dry_run(tmp_path)
    assert (status, errors) == (0, "")
    text = "\n".join(lines)
    assert "parameters  base 1.32B" in text
    assert "with predictor 1.40B" in text
    assert "layout      1 ranks = tensor 1 x pipeline 1 x data 1, ZeRO 1, bf16" in lines
    assert "length      190,735 steps, 100,000,071,680 tokens" in lines
    resolved = yaml.safe_load("\n".join(lines[lines.index("") :]))
    assert config_from_dict(resolved) == load_config(PAPER)


def test_a_dry_run_tells_its_launch_script_that_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTLAT_END_MARK", str(tmp_path / "mark"))
    assert main(["train", "--config", str(PAPER), "--dry-run"]) == 0
    assert (tmp_path / "mark").read_text() == "0\n"


def test_dry_run_of_a_layout(tmp_path: Path) -> None:
    overrides = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=4"]
    status, lines, _ = dry_run(tmp_path, *overrides, ranks="64")
    assert status == 0
    assert "layout      64 ranks = tensor 2 x pipeline 4 x data 8, ZeRO 1, bf16" in lines
    assert ("batch       512 rows x 1024 tokens = 8 rows x 8 micro-batches x 8 data-parallel ranks") in lines
    stages = [line for line in lines if line.startswith("stage ")]
    assert stages == [
        "stage 0     token embedding, decoder layers 0..6",
        "stage 1     decoder layers 7..13",
        "stage 2     decoder layers 14..19",
        "stage 3     decoder layers 20..21, final norm, objective",
    ]


def test_dry_run_finds_what_a_run_would(tmp_path: Path) -> None:
    status, lines, errors = dry_run(tmp_path, "deepspeed.train_batch_size=7", ranks="8")
    assert (status, lines) == (2, [])
    assert errors.startswith("error: deepspeed.train_batch_size is 7 but training.global_batch_size makes it 512")
    status, lines, errors = dry_run(tmp_path, ranks="5")
    assert (status, lines) == (2, [])
    assert errors.startswith("error: training.global_batch_size=512 is not a multiple of")


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["train", "--config"], ["export", "--checkpoint", "x"]],
    ids=["nothing", "unknown-command", "no-config", "no-value", "no-output"],
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: nextlat" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["train", "export", "generate", "chat", "evaluate", "report", "doctor", "ablate", "checkpoint", "configs", "init"],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert command in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"nextlat {nextlat_dist.__version__}\n"


def test_a_mistake_is_one_line_and_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "--config", str(PAPER), "training.sede=1"]
    monkeypatch.setenv("RANK", "0")
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: unknown config key 'training.sede'; the nearest known key is 'training.seed'\n"
    )
    monkeypatch.setenv("RANK", "1")
    assert main(arguments) == 2
    assert capsys.readouterr().err == ""


def test_an_error_that_is_no_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("nextlat_dist.config.load.load_config", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["train", "--config", str(PAPER)])


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nextlat_dist.config.load.load_config", interrupted)
    assert main(["train", "--config", str(PAPER)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


COMMANDS = dict(leaves(_parser(), "nextlat"))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help_and_default(name: str) -> None:
    assert undescribed(COMMANDS[name]) == []


def tried(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    try:
        status = main(list(arguments))
    except SystemExit as ended:
        status = int(ended.code or 0)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["{seed}", "--config", "{config}", "{out}", "--dry-run"],
        ["--config", "{config}", "{out}", "--dry-run", "{seed}"],
        ["{out}", "--config", "{config}", "--dry-run", "{seed}"],
        ["--dry-run", "{out}", "{seed}", "--config", "{config}"],
    ],
    ids=["before-and-after", "option-between", "around", "before"],
)
def test_overrides_stand_anywhere(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = tmp_path / "run.yaml"
    config.write_text("training: {seed: 1}\n")
    words = {"config": str(config), "seed": "training.seed=77", "out": f"output_dir={tmp_path}/out"}
    status, out, _ = tried(capsys, "train", *(word.format(**words) for word in arguments))
    assert status == 0
    assert "  seed: 77\n" in out
    assert f"output_dir: {tmp_path}/out\n" in out


def test_an_unknown_option_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = tried(capsys, "train", "a.b=1", "--config", "x", "--dry-rum", "c.d=2")
    assert status == 2
    assert "unrecognized arguments: --dry-rum" in errors


def test_the_sentence_of_the_command_line_has_no_secret_and_no_control_character(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, _, errors = tried(capsys, "report", "--run", "x", "https://me:hunter2@host/d", "\x1b[31m")
    assert status == 2
    assert "unrecognized arguments: https://***@host/d \\x1b[31m" in errors
    status, _, errors = tried(capsys, "train", "--config", "/none/\x1b[31m", "x" * 9000)
    assert (status, errors.count("\n")) == (2, 1)
    assert "/none/\\x1b[31m" in errors
    status, _, errors = tried(capsys, "train", "--config", str(PAPER), "x" * 9000)
    assert status == 2
    assert len(errors) < 500


@pytest.fixture
def small(tmp_path: Path, text_dataset: Path) -> Path:
    path = tmp_path / "small.yaml"
    raw = {"data": {"train": str(text_dataset / "train"), "validation": str(text_dataset / "validation")}}
    raw |= {"model": {"vocab_size": 600}, "output_dir": str(tmp_path / "run")}  # type: ignore[dict-item]
    path.write_text(yaml.safe_dump(raw))
    return path


def test_a_dry_run_opens_the_data_that_is_there(
    small: Path, tmp_path: Path, text_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def data_lines(*overrides: str) -> list[str]:
        status, out, errors = tried(capsys, "train", "--config", str(small), "--dry-run", *overrides)
        assert (status, errors) == (0, "")
        return [line for line in out.splitlines() if line.startswith(("data   ", "tokenizer  "))]

    train, validation = data_lines()
    assert train.startswith("data        train: ")
    assert " tokens in " in train
    assert validation.startswith("data        validation: ")
    assert data_lines(f"data.train={tmp_path}/none")[0] == (
        f"data        train: {tmp_path}/none is not here (it has no manifest.json): not checked"
    )
    assert data_lines("data.train=null")[0] == "data        data.train is not set: a run needs it, or data.sources"
    assert data_lines("data.train=http://127.0.0.1:9/x")[0].startswith("data        train: http://127.0.0.1:9/x cannot")
    assert data_lines("data.tokenizer=/none/t.model")[0] == "tokenizer   /none/t.model is not here: not checked"
    tokenizer = f"data.tokenizer={text_dataset}/train/tokenizer.model"
    assert data_lines(tokenizer)[0].startswith(f"tokenizer   {text_dataset}/train/tokenizer.model: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.vocab_size=599", "has 600 ids, but the model's vocab_size is 599"),
        ("data.tokenizer=README.md", "tokenizer README.md is not a sentencepiece model"),
        ("data.train=README.md", "README.md is not a finished dataset"),
        ("data.validation=.", "is not a finished dataset: it has no manifest.json"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    small: Path, override: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    status, out, errors = tried(capsys, "train", "--config", str(small), "--dry-run", override)
    assert (status, out) == (2, "")
    assert sentence in errors


def test_a_world_size_that_is_no_number(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    status, _, errors = tried(capsys, "train", "--config", str(small), "--dry-run")
    assert (status, errors) == (
        2,
        "error: the environment variable WORLD_SIZE is 'many', it must be the number of ranks\n",
    )


def test_a_dataset_given_as_a_checkpoint(
    text_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = str(text_dataset / "train")
    sentence = f"{dataset} is a dataset, not a checkpoint; name a run's directory of checkpoints or one of them"
    for arguments in (
        ["export", "--checkpoint", dataset, "--output", str(tmp_path / "export"), "--no-verify"],
        ["checkpoint", "reshape", dataset, "--output", str(tmp_path / "one")],
    ):
        status, _, errors = tried(capsys, *arguments)
        assert (status, errors) == (2, f"error: {sentence}\n")
    status, out, _ = tried(capsys, "checkpoint", "list", dataset)
    assert (status, out.splitlines()[1:]) == (1, [f"train: {sentence}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["generate", "--prompt", "x", "--top-p", "0"], "change --top-p"),
        (["generate", "--prompt", "x", "--draft-length", "99", "--max-new-tokens", "0"], "change --max-new-tokens"),
        (["evaluate", "speculative", "--prompts", "prompts", "--batch-size", "0"], "change --batch-size"),
        (["evaluate", "speculative", "--prompts", "prompts"], "set --prompt-tokens, or lower --max-new-tokens"),
    ],
)
def test_a_sentence_names_the_flag_that_was_typed(
    words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From Python it names the argument."""
    monkeypatch.chdir(CHECKOUT / "tests" / "fixtures" / "formats")
    assert main([*words, "--export", "export"]) == 2
    assert capsys.readouterr().err.rstrip().endswith(sentence)
