"""Text in the terminal while it is decoded: what `nextlat generate` and `nextlat chat` show.

The invariant: what was written never has to be taken back. A character whose bytes come in several tokens, and what may
be the beginning of a stop string, is held back until it is certain; in the end the text is that of the tokens.

    nextlat generate --export DIR --prompt TEXT --show-drafts
    nextlat chat --export DIR
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, TextIO

from nextlat_dist.errors import UserError
from nextlat_dist.inference.arguments import utf8
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import DraftLength, Piece
from nextlat_dist.reporting.console import OutputError, silence, write

LONGEST_CHARACTER_TOKENS = 4  # UTF-8, a byte a token
GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
# A terminal would obey control characters, and byte tokens can spell any: show them as pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {127: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}

HELP = """\
A line is added to the text as it stands, and the model continues from there. An empty line lets it continue.
  \\ at the end of a line   the text continues in the next line
  /reset                  start a new text
  /text                   show the text so far
  /temperature X          0 is greedy
  /draft N|adaptive       tokens drafted per cycle; 0: plain decoding
  /tokens N               longest answer
  /quit                   or Ctrl-D; Ctrl-C stops an answer
A line that begins with // adds one that begins with /."""


@dataclass(frozen=True)
class Settings:
    """Arguments of `Decoder.stream`."""

    max_new_tokens: int = 128
    draft_length: DraftLength | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Span:
    """A stretch of text whose last token was `drafted`, or picked by the base model."""

    text: str
    drafted: bool


class TextStream:
    """Turns the pieces of one continuation into text, as soon as it is certain."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self._text_of = decoder.continuation_text
        self._context = list(prompt_ids)  # what comes before `_pending`: whole characters, not only special tokens
        self._pending: list[int] = []  # tokens of a character that is not whole yet
        self._stops = tuple(stop_strings)
        self._held: list[tuple[str, bool]] = []  # characters that may begin a stop string, and whether drafted
        self._ended = False

    def push(self, piece: Piece) -> list[Span]:
        """What the piece makes certain."""
        for index, token in enumerate(piece.token_ids):
            self._pending.append(token)
            text = self._text_of(self._context, self._pending)
            if not text.endswith("\ufffd") or len(self._pending) == LONGEST_CHARACTER_TOKENS:
                self._settle(text, drafted=index < piece.accepted)
        held = "".join(character for character, _ in self._held)
        beginnings = (n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n]))
        return self._release(len(held) - max(beginnings, default=0))

    def finish(self) -> list[Span]:
        """What was held back and never became a stop string or a whole character."""
        if self._pending:
            self._settle(self._text_of(self._context, self._pending), drafted=False)
        return self._release(len(self._held))

    def _settle(self, text: str, *, drafted: bool) -> None:
        self._context = self._pending if text else self._context + self._pending
        self._pending = []
        if self._ended:
            return
        self._held += [(character, drafted) for character in text]
        held = "".join(character for character, _ in self._held)
        stops = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if stops:
            self._ended = True
            del self._held[min(stops) :]

    def _release(self, count: int) -> list[Span]:
        if self._ended:
            count = len(self._held)
        released, self._held = self._held[:count], self._held[count:]
        return [
            Span("".join(character for character, _ in group), drafted)
            for drafted, group in groupby(released, key=itemgetter(1))
        ]


class Screen:
    """Where text goes, `colour` for drafted text, and where remarks about it go."""

    def __init__(self, text: TextIO, remarks: TextIO, *, colour: bool) -> None:
        self.text, self.remarks, self.colour = text, remarks, colour
        if isinstance(text, io.TextIOWrapper):
            text.reconfigure(errors="replace")  # the model may say what the locale cannot write

    def show(self, spans: Sequence[Span]) -> None:
        for span in spans:
            text = span.text.translate(_PICTURES) if self.text.isatty() else span.text
            write(f"{GREEN}{text}{PLAIN}" if self.colour and span.drafted else text, self.text)

    def end_line(self) -> None:
        write("\n", self.text)

    def remark(self, line: str) -> None:
        """What is no part of the text; nobody has to be able to read it."""
        with suppress(BrokenPipeError, OutputError):
            write(f"{DIM}{line}{PLAIN}\n" if self.remarks.isatty() else f"{line}\n", self.remarks)


def wants_colour(choice: str, out: TextIO) -> bool:
    """`choice` is "always", "never" or "auto": if `out` is a terminal and NO_COLOR is not set."""
    return choice == "always" or (choice == "auto" and out.isatty() and not os.environ.get("NO_COLOR"))


@dataclass
class Answer:
    """What one continuation came to. The first token belongs to the prefill."""

    text: str = ""
    tokens: int = 0
    accepted: int = 0
    cycles: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def __str__(self) -> str:
        facts = [f"{self.tokens} token{'' if self.tokens == 1 else 's'}"]
        if self.cycles:
            facts.append(f"{(self.tokens - 1) / self.cycles:.2f} per cycle")
            facts.append(f"{self.accepted / self.tokens:.0%} drafted")
            facts.append(f"{(self.tokens - 1) / max(self.seconds, 1e-9):.0f} tokens/s")
        return f"[{', '.join([*facts, *(['interrupted'] if self.interrupted else [])])}]"


def answer(decoder: Decoder, prompt: str, settings: Settings, screen: Screen) -> Answer:
    """Stream the continuation of `prompt` to the screen; Ctrl-C ends it early.

    Raises:
        UserError: as `Decoder.generate`.
    """
    ids = decoder.encode(prompt)
    stream = TextStream(decoder, ids, settings.stop_strings)
    result = Answer()

    def show(spans: list[Span]) -> None:
        result.text += "".join(span.text for span in spans)
        screen.show(spans)

    pieces = decoder.stream(ids, **vars(settings))
    started = None
    try:
        for piece in pieces:
            result.tokens += len(piece.token_ids)
            result.accepted += piece.accepted
            if started is None:
                started = time.perf_counter()
            else:
                result.cycles += 1
                result.seconds = time.perf_counter() - started
            show(stream.push(piece))
    except KeyboardInterrupt:
        result.interrupted = True
    show(stream.finish())
    return result


def generate(decoder: Decoder, prompt: str, settings: Settings, screen: Screen) -> None:
    """Continue one prompt: its text on standard output, a line of figures after it."""
    try:
        result = answer(decoder, prompt, settings, screen)
        screen.end_line()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        silence(sys.stdout)
        return
    screen.remark(str(result))
    if result.interrupted:
        raise KeyboardInterrupt


def chat(decoder: Decoder, settings: Settings, screen: Screen, read: Callable[[], str]) -> None:
    """Continue a text to which every line read is added, until end of input, or until nobody reads the text any more.

    Args:
        read: gives the next line; raises EOFError at the end, KeyboardInterrupt for Ctrl-C at the prompt, UserError for
            a line that is no text.
    """
    screen.remark(f"{decoder.export}: a base model, it continues what you write; /help lists the commands")
    with suppress(BrokenPipeError):
        _chat(decoder, settings, screen, read)


def _chat(decoder: Decoder, settings: Settings, screen: Screen, read: Callable[[], str]) -> None:
    text, answers = "", 0
    while (line := _typed(screen, read)) is not None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                command, _, value = line[1:].partition(" ")
                if command == "quit":
                    return
                if command == "reset":
                    text = ""
                elif command == "text":
                    screen.show([Span(f"{text}\n", False)])
                elif command == "help":
                    screen.remark(HELP)
                else:
                    settings = _changed(decoder, settings, command, value.strip())
                continue
            prompt = text + line.removeprefix("/")
            result = answer(decoder, prompt, replace(settings, seed=settings.seed + answers), screen)
        except OutputError:
            raise
        except UserError as error:
            screen.remark(f"error: {error}")
            continue
        text, answers = prompt + result.text, answers + 1
        if not result.text.endswith("\n"):
            screen.end_line()
        screen.remark(str(result))


def _typed(screen: Screen, read: Callable[[], str]) -> str | None:
    """The next line that is one, with those that it continues; None: there is no more."""
    while True:
        try:
            line = read()
            while line.endswith("\\"):
                line = line[:-1] + "\n" + read()
            return line
        except EOFError:
            return None
        except KeyboardInterrupt:
            screen.remark("(Ctrl-D or /quit leaves)")
        except UserError as error:
            screen.remark(f"error: {error}")


def _changed(decoder: Decoder, settings: Settings, command: str, value: str) -> Settings:
    """`settings` with the value that a command gives, if the decoder takes it."""
    names = {"temperature": "temperature", "draft": "draft_length", "tokens": "max_new_tokens"}
    if command not in names:
        raise UserError(f"there is no command /{command}; /help lists them")
    try:
        given: Any = value if value == "adaptive" else float(value) if command == "temperature" else int(value)
    except ValueError:
        raise UserError(f"/{command} needs a number, but got {value!r}; /help lists the commands") from None
    changed = replace(settings, **{names[command]: given})
    decoder.stream("", **vars(changed))  # looks at its arguments before it decodes anything
    return changed


def read_line() -> str:
    """The next line of standard input, edited with readline where it is a terminal.

    Raises:
        UserError: it is not UTF-8.
    """
    if sys.stdin is None:  # closed
        raise EOFError
    if not sys.stdin.isatty():
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return utf8("the line", line).removesuffix("\n").removesuffix("\r")
    with suppress(ImportError):
        import readline  # noqa: F401  # importing it is what gives `input` its history
    try:
        with _no_interrupt_lost():
            return input("> ")
    except UnicodeDecodeError:
        raise UserError("the line is not UTF-8; type it again") from None


@contextmanager
def _no_interrupt_lost() -> Iterator[None]:
    """Inside, on the main thread, Ctrl-C ends `input` also when it comes just before the line editor waits for a key.

    Python looks for signals only when the wait is interrupted, and that one came too early for it. A thread learns of
    every signal and interrupts the wait again, by one that does nothing else but have the line drawn again.
    """
    main, over = threading.get_ident(), threading.Event()
    if main != threading.main_thread().ident:
        yield
        return
    signalled, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def nudge() -> None:
        os.read(signalled, 1)
        while not over.wait(0.05):
            signal.pthread_kill(main, signal.SIGWINCH)

    thread = threading.Thread(target=nudge, name="interrupts", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        over.set()
        os.write(wake, b"\0")
        thread.join()
        os.close(signalled)
        os.close(wake)


def read_all() -> str:
    """Standard input to its end.

    Raises:
        UserError: it is not UTF-8, or closed.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed; give the text with --prompt")
    return utf8("standard input", sys.stdin.buffer.read())
