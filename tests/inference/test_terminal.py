"""`nextlat generate` and `nextlat chat`: what is shown is the text of the tokens, and is never taken back."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nextlat_dist.cli import main
from nextlat_dist.inference import Decoder, Piece, load
from nextlat_dist.inference.terminal import (
    GREEN,
    PLAIN,
    Answer,
    Screen,
    Settings,
    Span,
    TextStream,
    answer,
    chat,
    generate,
    wants_colour,
)
from tests.kit.exports import word_decoder

TEXT = "import naïve 日本語 🙂🙂 self\n\treturn"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """Says whole words, and its drafts are right."""
    return word_decoder(tmp_path_factory.mktemp("words"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def pieces(ids: list[int], size: int) -> Iterator[Piece]:
    for start in range(0, len(ids), size):
        yield Piece(0, ids[start : start + size], 0)


def text_of(spans: list[Span]) -> str:
    return "".join(span.text for span in spans)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("prompt", ["", "alpha ", "日"])
def test_characters_come_whole_however_the_pieces_fall(decoder: Decoder, prompt: str, size: int) -> None:
    ids = decoder.encode(prompt)
    new = decoder.encode(prompt + TEXT)[len(ids) :]
    assert len(new) > 30, "characters of several tokens"
    stream = TextStream(decoder, ids)
    shown = ""
    for piece in pieces([*new, 2], size):
        shown += text_of(stream.push(piece))
        assert TEXT.startswith(shown)
    assert shown == TEXT
    assert stream.finish() == []


def test_bytes_that_never_become_a_character(decoder: Decoder) -> None:
    snowman = decoder.encode("☃")[1:]
    assert len(snowman) == 3
    stream = TextStream(decoder, [1])
    assert stream.push(Piece(0, snowman[:2], 0)) == []
    assert text_of(stream.finish()) == "\ufffd\ufffd"
    stream = TextStream(decoder, [1])
    stream.push(Piece(0, snowman[:1], 0))
    assert text_of(stream.push(Piece(0, decoder.encode("alpha")[1:], 0))) == "\ufffdalpha"
    assert text_of(stream.push(Piece(0, snowman, 0))) == "☃"
    assert text_of(stream.push(Piece(0, snowman[:1] * 4, 0))) == 4 * "\ufffd"  # no character is that long


def test_the_space_after_a_special_token(decoder: Decoder, tmp_path: Path) -> None:
    """A tokenizer that takes the first space of a text away: what follows "</s>" is not the first."""
    shutil.copytree(decoder.export, tmp_path / "export")
    path = tmp_path / "export" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    path.write_text(json.dumps(raw))
    stripping = load(tmp_path / "export")
    new = [*decoder.encode(" alpha")[1:], 2, *decoder.encode(" beta")[1:]]
    assert text_of(TextStream(stripping, [1]).push(Piece(0, new, 0))) == "alpha beta"


def test_the_drafted_part_of_a_piece(decoder: Decoder) -> None:
    new = decoder.encode("import self value")[1:]
    for accepted in range(len(new)):
        spans = TextStream(decoder, [1]).push(Piece(0, new, accepted))
        drafted = decoder.continuation_text([1], new[:accepted])
        assert text_of([span for span in spans if span.drafted]) == drafted
        assert text_of(spans) == "import self value"
        assert len(spans) <= 2


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_a_stop_string_is_never_shown(decoder: Decoder, size: int) -> None:
    text = "alpha beta\n\nbeta\n\n\nself"
    new = decoder.encode(text)[1:]
    for stops, wanted in [
        (["\n\n\n"], "alpha beta\n\nbeta"),
        (["beta\n\n\n", "self"], "alpha beta\n\n"),
        (["\n\nb", "beta\n\n\n"], "alpha beta"),
        (["self", "\n\n\nself"], "alpha beta\n\nbeta"),
        (["selfish"], text),
    ]:
        stream = TextStream(decoder, [1], stops)
        shown = ""
        for piece in pieces(new, size):
            shown += text_of(stream.push(piece))
            assert wanted.startswith(shown)
        assert shown + text_of(stream.finish()) == wanted


def test_text_is_held_back_no_longer_than_it_has_to_be(decoder: Decoder) -> None:
    stream = TextStream(decoder, [1], ["\n\n"])
    assert text_of(stream.push(Piece(0, decoder.encode("alpha\n")[1:], 0))) == "alpha"
    assert text_of(stream.push(Piece(0, decoder.encode("beta")[1:], 0))) == "\nbeta"


def test_screen() -> None:
    spans = [Span("a\tb\n", True), Span("\x1b[2J\r\x9b", False)]
    pipe, terminal = io.StringIO(), Terminal()
    Screen(pipe, io.StringIO(), colour=False).show(spans)
    assert pipe.getvalue() == "a\tb\n\x1b[2J\r\x9b"
    Screen(terminal, io.StringIO(), colour=True).show(spans)
    assert terminal.getvalue() == f"{GREEN}a\tb\n{PLAIN}␛[2J␍\ufffd"


def test_when_to_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour("auto", Terminal())
    assert not wants_colour("auto", io.StringIO())
    assert wants_colour("always", io.StringIO())
    assert not wants_colour("never", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour("auto", Terminal())


def test_an_answer_is_that_of_generate(decoder: Decoder) -> None:
    for draft_length in (0, 4):
        out = io.StringIO()
        settings = Settings(max_new_tokens=22, draft_length=draft_length)
        result = answer(decoder, "alpha", settings, Screen(out, out, colour=False))
        [row] = decoder.generate(["alpha"], max_new_tokens=22, draft_length=draft_length)
        assert out.getvalue() == result.text == row.text
        assert (result.tokens, result.cycles, result.accepted) == (22, row.cycles, row.accepted)
        assert result.accepted == (0 if draft_length == 0 else 22 - 1 - row.cycles)
    assert str(Answer("", 22, 16, 5, 0.1)) == "[22 tokens, 4.20 per cycle, 73% drafted, 210 tokens/s]"
    assert str(Answer("", 1)) == "[1 token]"


def scripted(lines: list[str | type[BaseException]]) -> Callable[[], str]:
    script = iter(lines)

    def read() -> str:
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_chat_continues_from_the_text_so_far(decoder: Decoder) -> None:
    def answers(text: str, **options: int) -> str:
        [row] = decoder.generate([text], **{"max_new_tokens": 4, "draft_length": 2, **options})
        assert row.text is not None
        return row.text

    out, remarks = io.StringIO(), io.StringIO()
    settings = Settings(max_new_tokens=4, draft_length=2)
    lines = ["alpha", KeyboardInterrupt, "beta\\", "", "", "/tokens 6", "//x", "/text", "/reset", "self", "/quit", "no"]
    chat(decoder, settings, Screen(out, remarks, colour=False), scripted(lines))
    first = answers("alpha")
    text = f"alpha{first}beta\n"
    second = answers(text)
    third = answers(text + second)
    fourth = answers(f"{text}{second}{third}/x", max_new_tokens=6)
    whole = f"{text}{second}{third}/x{fourth}"
    assert out.getvalue() == "".join(
        f"{part}\n" for part in (first, second, third, fourth, whole, answers("self", max_new_tokens=6))
    )
    assert remarks.getvalue().count("[4 tokens, ") == 3
    assert "(Ctrl-D or /quit leaves)\n" in remarks.getvalue()


def test_a_mistake_in_chat_changes_nothing(decoder: Decoder) -> None:
    out, remarks = io.StringIO(), io.StringIO()
    lines: list[str | type[BaseException]] = [
        *("/tempreature 1", "/temperature hot", "/temperature -1", "/draft adaptive", "/tokens 0", "alpha " * 200),
        "alpha",
    ]
    chat(decoder, Settings(max_new_tokens=3, draft_length=1), Screen(out, remarks, colour=False), scripted(lines))
    [row] = decoder.generate(["alpha"], max_new_tokens=3, draft_length=1)
    assert out.getvalue() == f"{row.text}\n"
    errors = [line for line in remarks.getvalue().splitlines() if line.startswith("error: ")]
    assert [line.split(",")[0] for line in errors] == [
        "error: there is no command /tempreature; /help lists them",
        "error: /temperature needs a number",
        "error: temperature is -1.0",
        'error: draft_length is "adaptive"',
        "error: max_new_tokens is 0",
        errors[-1].split(",")[0],
    ]
    assert "shorten the prompt" in errors[-1]


def test_an_interrupted_answer_stays_as_far_as_it_was_shown(decoder: Decoder) -> None:
    class Interrupting(io.StringIO):
        writes = 0

        def flush(self) -> None:
            self.writes += 1
            if self.writes == 3:
                raise KeyboardInterrupt

    out, remarks = Interrupting(), io.StringIO()
    settings = Settings(max_new_tokens=40, draft_length=0)
    chat(decoder, settings, Screen(out, remarks, colour=False), scripted(["alpha", "/text"]))
    [row] = decoder.generate(["alpha"], max_new_tokens=3, draft_length=0)
    assert out.getvalue() == f"{row.text}\nalpha{row.text}\n"
    assert "[3 tokens, 1.00 per cycle, 0% drafted, " in remarks.getvalue()
    assert ", interrupted]" in remarks.getvalue()


def test_a_reader_that_leaves_early_is_no_error(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    remarks = io.StringIO()
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        generate(decoder, "alpha", Settings(draft_length=0), Screen(Closed(), remarks, colour=False))
        os.write(out.fileno(), b"goes nowhere")
    assert (tmp_path / "out").read_text() == remarks.getvalue() == ""


def test_generate_command(
    decoder: Decoder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--export", str(decoder.export), "--max-new-tokens", "12", "--draft-length", "3"]
    [row] = load(decoder.export).generate(["alpha"], max_new_tokens=12, draft_length=3)
    assert row.text
    assert main([*command, "--prompt", "alpha"]) == 0
    output, errors = capsys.readouterr()
    assert output == f"{row.text}\n"
    assert errors.startswith(f"[12 tokens, {11 / row.cycles:.2f} per cycle, {row.accepted / 12:.0%} drafted, ")

    stop = row.text[7:9]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"alpha")))
    assert main([*command, "--prompt", "-", "--stop", stop, "--stop", "never said"]) == 0
    assert capsys.readouterr().out == f"{row.text[: row.text.index(stop)]}\n"

    assert main([*command, "--prompt", "alpha", "--show-drafts", "--color", "always"]) == 0
    coloured = capsys.readouterr().out
    assert coloured.replace(GREEN, "").replace(PLAIN, "") == f"{row.text}\n"
    assert coloured.count(GREEN) == coloured.count(PLAIN) == row.cycles

    assert main([*command, "--prompt", "alpha", "--draft-length", "adaptive"]) == 2
    assert capsys.readouterr().err.startswith('error: draft_length is "adaptive", but ')
    with pytest.raises(SystemExit) as caught:
        main([*command, "--prompt", "alpha", "--draft-length", "many"])
    assert caught.value.code == 2
    assert "'many' is neither a number nor adaptive" in capsys.readouterr().err


# The hook runs when the prompt is shown and no key is waited for yet; C code sends the signal, so that Python, which
# looks for signals between its own instructions, does not see it there.
EARLY_INTERRUPT = """
import ctypes, functools, os, readline
from nextlat_dist.inference.terminal import read_line
readline.set_pre_input_hook(functools.partial(getattr(ctypes.CDLL(None), "raise"), 2))
try:
    read_line()
except KeyboardInterrupt:
    print("heard", flush=True)
readline.set_pre_input_hook(None)
print(f"<{read_line()}>", flush=True)
"""


def test_an_interrupt_between_the_prompt_and_the_wait_is_heard() -> None:
    process, ours = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", EARLY_INTERRUPT], {**os.environ, "TERM": "xterm"})
    seen = b""
    try:
        for wanted, typed in ((b"heard", b""), (b"> ", b"next\n"), (b"<next>", b"")):
            while wanted not in seen:
                assert select.select([ours], [], [], 60)[0], seen
                seen += os.read(ours, 4096)
            seen = seen.partition(wanted)[2]
            os.write(ours, typed)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(ours)


def test_chat_in_a_terminal(decoder: Decoder) -> None:
    """Colours, line editing, Ctrl-C and Ctrl-D, as a person at a terminal meets them."""
    command = ["-m", "nextlat_dist.cli", "chat", "--export", str(decoder.export), "--max-new-tokens", "9"]
    process, ours = pty.fork()
    if process == 0:
        environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
        os.execve(sys.executable, [sys.executable, *command, "--show-drafts"], {**environment, "TERM": "xterm"})
    seen = b""

    def until(wanted: bytes, count: int = 1) -> None:
        nonlocal seen
        while seen.count(wanted) < count and select.select([ours], [], [], 120)[0]:
            seen += os.read(ours, 4096)
        assert seen.count(wanted) >= count, seen

    try:
        until(b"> ")
        os.write(ours, b"\x03")
        until(b"(Ctrl-D or /quit leaves)")
        until(b"> ", 2)  # what is typed before the line editor is back would be lost
        os.write(ours, b"alphaX\x7f\n")  # a typing mistake taken back
        until(b" tokens/s]")
        until(b"> ", 3)
        os.write(ours, b"\x04")
        _, status = os.waitpid(process, 0)
        assert status == 0
    except BaseException:
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        os.close(ours)
    [row] = load(decoder.export).generate(["alpha"], max_new_tokens=9)
    shown = seen.decode()
    assert row.text is not None
    assert row.text in shown.replace(GREEN, "").replace(PLAIN, "")
    assert GREEN in shown
    assert f"[9 tokens, {8 / row.cycles:.2f} per cycle, {row.accepted / 9:.0%} drafted, " in shown
