"""Two hundred damaged, edited and foreign exports: each is decoded, or refused with one sentence."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.cli import main
from tests.kit.damaged_exports import damage
from tests.kit.exports import calibration, random_predictor, random_weights, tiny_config, write_export, write_tokenizer
from tests.kit.fuzz import Findings, Sandbox, cases, generator, warm

COUNT = 200
SECONDS = 240  # of a processor, all cases together
FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"


def written_now(directory: Path) -> Path:
    """An export with everything: tokenizer, predictor, calibration, draft vocabulary."""
    directory.mkdir()
    config = tiny_config(vocab_size=write_tokenizer(directory))
    export = write_export(directory, config, random_weights(config), random_predictor(config.hidden_size))
    (export / "tokenizer.source.model").unlink()
    calibration().save(export / "latent_predictor")
    return export


def command(export: Path, draw: random.Random) -> tuple[list[str], bytes]:
    """A command line that opens the export, and its standard input."""
    options = ["--export", str(export), "--max-new-tokens", str(draw.choice([1, 4, 9]))]
    options += ["--temperature", draw.choice(["0", "0", "1"])]
    options += draw.choice([[], [], ["--draft-length", "2"], ["--draft-length", "adaptive"], ["--draft-length", "0"]])
    if draw.random() < 0.3:
        return ["chat", *options], b"def f\n\n/text\n"
    return ["generate", *options, "--prompt", draw.choice(["def f(x):", "alpha beta", "\u2581<s>", "x" * 40])], b""


def answered(sandbox: Sandbox, found: Findings, number: int, exports: list[Path]) -> None:
    draw = generator("export", number)
    export = sandbox.cwd / "export"
    shutil.rmtree(export, ignore_errors=True)
    shutil.copytree(draw.choice(exports), export)
    what = damage(export, draw)
    arguments, stdin = command(export, draw)
    before = sandbox.files()
    answer = sandbox.run(partial(main, arguments), stdin=stdin)
    found.judge(f"export {number}: {what}; {arguments[0]} {arguments[3:]}", answer, sandbox.changed(before))


@pytest.mark.slow
def test_damaged_exports(tmp_path: Path) -> None:
    warm("torch", "transformers", "tokenizers", "nextlat_dist.inference.loading", "nextlat_dist.inference.terminal")
    exports = [written_now(tmp_path / "now"), FORMATS / "export", FORMATS / "mtp_export"]
    sandbox, found = Sandbox(tmp_path / "sandbox"), Findings(SECONDS)
    for number in cases("export", COUNT):
        answered(sandbox, found, number, exports)
    found.check()


def test_an_internal_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an error of ours after the reading of an export is no sentence."""
    export = written_now(tmp_path / "now")

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr("nextlat_dist.inference.loading.decoder_of", broken)
    answer = Sandbox(tmp_path / "sandbox").run(partial(main, ["generate", "--export", str(export), "--prompt", "x"]))
    assert answer.status == 1
    assert "RuntimeError: planted" in answer.err


def test_an_unchanged_export_is_decoded(tmp_path: Path) -> None:
    """The other control: what is damaged above is whole before."""
    sandbox = Sandbox(tmp_path / "sandbox")
    for number, export in enumerate([written_now(tmp_path / "now"), FORMATS / "export", FORMATS / "mtp_export"]):
        answer = sandbox.run(partial(main, ["generate", "--export", str(export), "--prompt", "def"]))
        assert answer.status == 0, (number, answer.err)
        assert json.loads((export / "config.json").read_text())["model_type"] == "llama"
