"""JSON lines: one object per line, of which some fields are read.

Invariant: whatever a line holds, it gives its fields or one sentence that names the line; a number or a value elsewhere
in the object that Python could not hold is no obstacle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_tools.text.formats import without_bom
from nextlat_dist.errors import UserError

# Parsing takes up to ten times a line's size in memory.
LINE_BYTES = 1 << 26
_KINDS = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


@dataclass(frozen=True)
class Fields:
    """Names of the fields of JSONL and Parquet documents; `prompt` and `split` only where asked for."""

    text: str = "text"
    prompt: str | None = None
    split: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in (self.text, self.prompt, self.split) if name is not None]

    @property
    def identity(self) -> dict[str, Any]:
        """As `TextSource.identity`."""
        return {"--field": self.text, "--prompt-field": self.prompt, "--split-field": self.split}


class BadLine(ValueError):
    """A line that holds no document; the message is a sentence on it."""


def lines_of(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line with its end) of a stream; a byte order mark at its beginning is dropped.

    Raises:
        UserError: a line is too long to be held.
    """
    number = 0
    while line := stream.readline(LINE_BYTES):
        number += 1
        if len(line) == LINE_BYTES and not line.endswith(b"\n"):
            raise UserError(
                f"{name} line {number} is longer than {LINE_BYTES / 1e6:.0f} MB; a document as long as that is given "
                "as a text file of its own"
            )
        yield number, without_bom(line) if number == 1 else line


def parse_fields(line: bytes, line_name: str, fields: Fields) -> tuple[bytes, bytes | None, str | None]:
    """Text, prompt and split of a line.

    Raises:
        BadLine: it is no JSON object with these fields of text.
    """
    raw = _parsed(line, line_name)
    values: dict[str, str] = {}
    for name in fields.names:
        if not isinstance(raw, dict):
            raise BadLine(f"{line_name} is {kind_of(raw)}; each line must be one JSON object")
        if name not in raw:
            raise BadLine(
                f"{line_name} has no field {name!r}; name the fields with --field, --prompt-field, --split-field"
            )
        if not isinstance(raw[name], str | None):
            raise BadLine(f"field {name!r} of {line_name} is {kind_of(raw[name])}; it must be a string")
        values[name] = raw[name] or ""
    return (
        text_bytes(values[fields.text]),
        None if fields.prompt is None else text_bytes(values[fields.prompt]),
        None if fields.split is None else values[fields.split],
    )


def kind_of(value: Any) -> str:
    """What a value is called in JSON."""
    return _KINDS.get(type(value), "null")


def _parsed(line: bytes, line_name: str) -> Any:
    # surrogateescape carries bytes that are no UTF-8 through the parser, to be treated like those of a text file.
    text = line.decode("utf-8", "surrogateescape")
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a whole number of more digits than Python converts
            return json.loads(text, parse_int=_short_int)
    except ValueError as error:
        hint = " (a value over several lines is not JSON lines)" if line.strip() in (b"{", b"[") else ""
        raise BadLine(f"{line_name} is not JSON ({error}); each line must be one JSON object{hint}") from None
    except RecursionError:
        raise BadLine(f"{line_name} is nested too deeply to be read; each line must be one JSON object") from None


def _short_int(digits: str) -> int:
    """A number that is of no interest but may be long."""
    return int(digits[:18])


def text_bytes(text: str) -> bytes:
    """The bytes of a parsed string; never valid UTF-8 where it holds a surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        raw = text.encode("utf-8", "surrogateescape")
        raw.decode()
    except UnicodeDecodeError:
        return raw  # bytes of the file that are no UTF-8
    except UnicodeEncodeError:
        pass
    # Lone surrogates written as JSON escapes; a few of them would pass for the bytes of another character.
    return text.encode("utf-8", "surrogatepass")
