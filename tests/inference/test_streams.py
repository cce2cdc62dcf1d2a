"""Standard streams of `nextlat generate` and `nextlat chat`: closed, full, without a reader, or not text."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from nextlat_dist.cli import main
from nextlat_dist.errors import UserError
from nextlat_dist.inference import Decoder
from nextlat_dist.inference.terminal import Screen, Settings, chat, generate
from tests.kit.exports import word_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return word_decoder(tmp_path_factory.mktemp("words"))


def test_a_full_disk_is_one_sentence(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.TextIOWrapper):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    settings, typed = Settings(draft_length=0, max_new_tokens=3), []

    def read() -> str:
        typed.append("alpha")
        return "alpha"

    for talk in (False, True):
        with (tmp_path / "out").open("wb") as out:
            monkeypatch.setattr(sys, "stdout", Full(out))
            screen = Screen(sys.stdout, io.StringIO(), colour=False)
            with pytest.raises(UserError, match="standard output cannot be written: No space left on device"):
                chat(decoder, settings, screen, read) if talk else generate(decoder, "alpha", settings, screen)
            os.write(out.fileno(), b"goes nowhere")
        assert (tmp_path / "out").read_bytes() == b""
    assert typed == ["alpha"], "a chat ends there"


def test_output_closed_from_the_beginning_is_one_sentence(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    for command in (["generate", "--prompt", "alpha"], ["chat"]):
        assert main([*command, "--export", str(decoder.export)]) == 2
        assert capsys.readouterr().err.startswith("error: standard output is closed")


def test_nobody_reads_the_remarks(decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    text = io.StringIO()
    generate(decoder, "alpha", Settings(draft_length=0, max_new_tokens=3), Screen(text, Closed(), colour=False))
    assert text.getvalue()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--prompt", "caf\udce9 ", "--prompt holds the byte 0xe9, which is not UTF-8, at position 3"),
        ("--stop", "\udce9", "--stop holds the byte 0xe9, which is not UTF-8, at position 0"),
    ],
)
def test_bytes_on_the_command_line(
    decoder: Decoder, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    options = {"--prompt": "alpha", option: value}
    flat = [part for pair in options.items() for part in pair]
    assert main(["generate", "--export", str(decoder.export), *flat]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_standard_input_that_is_no_text(
    decoder: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt is refused; a chat continues with its next line."""
    options = ["--export", str(decoder.export), "--max-new-tokens", "3", "--draft-length", "0"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait")))
    assert main(["generate", *options, "--prompt", "-"]) == 2
    assert "error: standard input holds the byte 0xe9 in line 1, which is not UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfalpha\ncaf\xe9\n/text\n")))
    assert main(["chat", *options]) == 0
    shown = capsys.readouterr()
    assert "error: the line holds the byte 0xe9" in shown.err
    [row] = decoder.generate(["alpha"], max_new_tokens=3, draft_length=0)
    assert shown.out == f"{row.text}\nalpha{row.text}\n"
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", *options]) == 0
    assert main(["generate", *options, "--prompt", "-"]) == 2
