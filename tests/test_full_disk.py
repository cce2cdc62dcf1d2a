"""No room for a command's file: one sentence on standard error, exit status 2, the file that was there whole.

RLIMIT_FSIZE stands in for the disk: it binds any user, and the mechanism is that of a full or a read-only one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_tools import cli as data_cli
from data_tools.text import stdlib
from nextlat_dist import cli
from nextlat_dist.experiments.budget import start_over
from nextlat_dist.files import CannotWriteError
from nextlat_dist.huggingface.drafters.format import write_draft_vocabulary
from nextlat_dist.reporting.pictures import panels, save_picture
from tests.kit.system import access_as_written, files_up_to

FORMATS = Path(__file__).parent / "fixtures" / "formats"
RUN = FORMATS / "run"
DATA = FORMATS / "data" / "train"
CORPUS = Path(__file__).parent / "test_cli.py"
TOKENIZER = ["tokenizer", "--input", CORPUS, "--vocab-size", 400]
MIXTURE = ["mix-preview", "--source", f"a={DATA}:1", "--tokens", 10_000]


def refusal(main: Callable[[list[str]], int], arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with files_up_to(64):
        assert main([str(word) for word in arguments]) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [
        (data_cli.main, [*TOKENIZER, "--output", "{}"], "tokenizer.model"),
        (data_cli.main, ["inspect", DATA, "--json", "{}"], "report.json"),
        (data_cli.main, ["inspect", DATA, "--png", "{}"], "lengths.png"),
        (data_cli.main, ["verify", DATA, "--json", "{}"], "report.json"),
        (data_cli.main, [*MIXTURE, "--json", "{}"], "mix.json"),
        (data_cli.main, [*MIXTURE, "--png", "{}"], "mix.png"),
        (cli.main, ["doctor", "--quick", "--json", "{}"], "doctor.json"),
    ],
    ids=["tokenizer", "inspect", "inspect-png", "verify", "mix-preview", "mix-preview-png", "doctor"],
)
def test_the_old_file_stays(
    main: Callable[[list[str]], int],
    arguments: list[object],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    path.write_text("before")
    filled = [path if word == "{}" else word for word in arguments]
    assert f"{path} cannot be written (File too large); make room there" in refusal(main, filled, capsys)
    assert path.read_text() == "before"
    assert [left.name for left in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "name"), [(["init"], "run.yaml"), (["configs", "quickstart"], "a.yaml"), (["configs", "cpu"], "cpu")]
)
def test_a_new_file_is_not_there(
    arguments: list[object], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{tmp_path / name} cannot be written (" in refusal(
        cli.main, [*arguments, "--output", tmp_path / name], capsys
    )
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_it_found_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading all of a dataset takes long: a file that cannot be written must not cost the result."""
    with files_up_to(64):
        assert data_cli.main(["inspect", str(DATA), "--json", str(tmp_path / "report.json")]) == 2
    assert "tokens per document" in capsys.readouterr().out


def test_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [stdlib.Text("code/a.py", "code", "train", "a = 1\n" * 50)]
    monkeypatch.setattr(stdlib, "build", lambda *_: texts)
    (tmp_path / "stdlib.jsonl").write_text("before")
    sentence = refusal(data_cli.main, ["stdlib", "--output", tmp_path], capsys)
    assert f"{tmp_path / 'stdlib.jsonl'} cannot be written (File too large)" in sentence
    assert (tmp_path / "stdlib.jsonl").read_text() == "before"


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_bytes((RUN / "metrics.jsonl").read_bytes())
    for name in ("report.json", "report.md", "loss_terms.png"):
        (tmp_path / name).write_text("before")
    assert "cannot be written (File too large)" in refusal(cli.main, ["report", "--run", tmp_path], capsys)
    assert all((tmp_path / name).read_text() == "before" for name in ("report.json", "report.md", "loss_terms.png"))
    assert len(list(tmp_path.iterdir())) == 4


def test_reshape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reshape: list[object] = ["checkpoint", "reshape", RUN / "checkpoints", "--output", tmp_path / "one"]
    assert "step_00000058 cannot be written (" in refusal(cli.main, reshape, capsys)
    assert list((tmp_path / "one").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    assert "is not an empty directory" in refusal(cli.main, [*reshape[:-1], tmp_path / "file"], capsys)


def test_a_folder_without_access(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o555)
    with access_as_written():
        assert data_cli.main(["verify", str(DATA), "--json", str(tmp_path / "new" / "report.json")]) == 2
    tmp_path.chmod(0o755)
    assert "report.json cannot be written (Permission denied); make room there or repair" in capsys.readouterr().err


def test_a_draft_vocabulary_that_does_not_fit_costs_no_calibration(tmp_path: Path) -> None:
    for name in ("draft_vocabulary.safetensors", "calibration.json"):
        (tmp_path / name).write_text("before")
    with files_up_to(64), pytest.raises(CannotWriteError, match=r"draft_vocabulary\.safetensors cannot be written"):
        write_draft_vocabulary(tmp_path, torch.arange(100))
    assert [(path.name, path.read_text()) for path in sorted(tmp_path.iterdir())] == [
        ("calibration.json", "before"),
        ("draft_vocabulary.safetensors", "before"),
    ]


@pytest.mark.parametrize(("name", "begin"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_a_picture_is_what_its_name_says(name: str, begin: bytes, tmp_path: Path) -> None:
    figure, _ = panels(1, "title")
    save_picture(figure, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_benchmark_replaces_its_own_folder_alone(tmp_path: Path) -> None:
    start_over(tmp_path / "new", "path_star")
    (tmp_path / "new" / "run").mkdir()
    (tmp_path / "new" / "run" / "file").write_text("of the first run")
    start_over(tmp_path / "new", "path_star")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".nextlat-benchmark"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for folder, benchmark in ((tmp_path / "mine", "path_star"), (tmp_path / "new", "gpu_decoding")):
        with pytest.raises(ValueError, match="is not empty and is no folder of this benchmark"):
            start_over(folder, benchmark)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
