"""The console: text for the person who typed the command, and the progress of what takes long.

Invariant: no message sends a control character to a terminal. Names of files, text of documents and whatever else a
file holds may contain some that clear the screen, change its colours or type a command: they are shown as escapes.
"""

from __future__ import annotations

import os
import sys
import time
import unicodedata
from contextlib import suppress
from typing import TextIO

from nextlat_dist.errors import UserError

LONGEST = 2000  # characters of a sentence about an input that may be anything
_CONTROL, _SURROGATE = "Cc", "Cs"
# Turn the direction of writing, so that a name reads as another one.
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, *, keep: str = "\n\t") -> str:
    """The text with every control character, and every byte of a file name that is not UTF-8, as an escape: `\\x1b`.

    Args:
        keep: control characters to leave as they are.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(each) if each not in keep and _is_control(each) else each for each in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in (_CONTROL, _SURROGATE) or character in _DIRECTIONS


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class OutputError(UserError):
    """Standard output cannot be written."""


def say(text: str, *, error: bool = False) -> None:
    """One message, at once: results on stdout; with `error` what is no result (problems, progress) on stderr.

    Whoever reads them may leave: the rest is then written nowhere. Problems and progress are never worth an error.

    Raises:
        OutputError: stdout cannot be written.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed before we began
        return
    with suppress(BrokenPipeError):
        try:
            write(f"{printable(text)}\n", stream)
        except OutputError:
            if not error:
                raise


def write(text: str, stream: TextIO) -> None:
    """Text on a stream, at once. After an error, what is still to come on that stream is written nowhere.

    Raises:
        BrokenPipeError: the reader, such as `head`, has left.
        OutputError: another reason, such as a full disk.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as problem:
        if stream in (sys.stdout, sys.stderr):
            silence(stream)
        if isinstance(problem, BrokenPipeError):
            raise
        name = "standard output" if stream is sys.stdout else "the output"
        raise OutputError(f"{name} cannot be written: {problem.strerror}; write it somewhere else") from None


def silence(stream: TextIO) -> None:
    """From now on, what is written on `stream`, and what it still holds back, goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say_error(message: object) -> None:
    """The one sentence about a user's mistake: short, and without what a terminal would act on."""
    say(f"error: {printable(shortened(str(message)))}", error=True)


def shortened(text: str, longest: int = LONGEST) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … ({len(text) - 2 * half:,} more characters) … {text[-half:]}"


class Progress:
    """Lines on stderr, at most one every two seconds: units done, tokens per second so far, time left."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.label, self.total, self.shown = label, total, shown
        self.done = self.tokens = 0
        self.started = self.printed = time.monotonic()

    def add(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if self.shown and (now - self.printed >= 2 or self.done == self.total):
            self.printed = now
            elapsed = max(now - self.started, 1e-9)
            left = elapsed / self.done * (self.total - self.done)
            rate = f"{self.tokens / elapsed:,.0f} tokens/s"
            say(f"{self.label}: {self.done}/{self.total}, {rate}, {left:.0f} s left", error=True)
