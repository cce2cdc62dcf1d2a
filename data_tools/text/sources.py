"""Read documents from folders, globs, text files, JSONL, Parquet and standard input, in a fixed order.

A source is a list of parts (here: files) that are read one after the other, so that whole parts can be skipped.

A text file is one document, a line of JSONL, a row of Parquet and a line of standard input are one each. What a file
holds is told by its first bytes and then by its name, capitals or not.

Invariant: names are relative to the input they came from and files are visited in sorted order, so the same data gives
the same documents, names and order on every machine. Text is handed on as the bytes that were there: nothing is
decoded, normalised or dropped here but a byte order mark at the beginning of a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from data_tools.text.find import SourceFile
from data_tools.text.formats import (
    READ_ERRORS,
    decompressed,
    is_binary,
    looks_compressed,
    other_format,
    peeked,
    plain_name,
    utf_encoding,
    without_bom,
)
from data_tools.text.json_lines import BadLine, Fields, lines_of, parse_fields
from nextlat_dist.data.order import permutation
from nextlat_dist.errors import UserError, require_extra

JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
JSON_SUFFIX = ".json"
PARQUET_SUFFIX = ".parquet"
PARQUET_MAGIC = b"PAR1"
TEXT = Fields()
PARQUET_BATCH_BYTES = 1 << 24  # about so many at a time, of all columns
PIECE_BYTES = 1 << 20  # a longer text file is handed on in pieces


@dataclass(frozen=True)
class TextDocument:
    """One document as found.

    Attributes:
        name: path relative to its input, with `:number` (from 1) for the lines or rows of a file of many documents.
        text: bytes, meant to be UTF-8.
        prompt: bytes of the prompt field, None where no prompt field was asked for.
        split: value of the split field, None where none was asked for.
        source_bytes: bytes of input that this document took, for progress.
        may_be_binary: found in a folder, so that it may not be text at all.
        part: number of the part of the source that it is in, from 0.
        fault: a sentence on a line that holds no document, None for a document.
        begins, ends: a long document comes in several pieces of whole characters, one after the other; of these the
            first begins it and the last ends it.
        cut_anywhere: a piece that ends where it had to, so that its last tokens may differ from those of the whole.
    """

    name: str
    text: bytes
    prompt: bytes | None
    split: str | None
    source_bytes: int
    may_be_binary: bool = False
    part: int = 0
    fault: str | None = None
    begins: bool = True
    ends: bool = True
    cut_anywhere: bool = False


class TextSource(Protocol):
    """Documents in a fixed order, part after part."""

    @property
    def parts(self) -> int:
        """Number of parts."""
        ...

    @property
    def total_bytes(self) -> int | None:
        """Bytes to read for all documents, None where that is not known."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides which documents there are, as JSON with a name for each thing: a change is a change of these."""
        ...

    def documents(self, first_part: int = 0) -> Iterator[TextDocument]:
        """The documents from that part on; raises UserError for what cannot be read or has not the fields asked for."""
        ...

    def shuffled(self, seed: int) -> TextSource:
        """The same documents with the parts in another order, which depends on the seed and their number alone."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Documents of files; each file is a part."""

    files: Sequence[SourceFile]
    fields: Fields = TEXT
    stdin_format: Literal["lines", "jsonl"] | None = None

    @property
    def parts(self) -> int:
        """One for each file."""
        return len(self.files)

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files; None when standard input is one of them."""
        sizes = [size for _, size, _ in self._stamps()]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files. Of standard input nothing is known."""
        stamps = json.dumps(list(self._stamps())).encode()
        return {
            "input files": {"files": len(self.files), "sha256": hashlib.sha256(stamps).hexdigest()},
            "--format": self.stdin_format or "lines",
            **self.fields.identity,
        }

    def _stamps(self) -> Iterator[tuple[str, int | None, int | None]]:
        for file in self.files:
            if file.path is None:
                yield file.name, None, None
                continue
            try:
                status = file.path.stat()
            except OSError as error:
                raise UserError(f"input {file.name} cannot be read: {error.strerror}; change --input") from None
            yield file.name, status.st_size, status.st_mtime_ns

    def documents(self, first_part: int = 0) -> Iterator[TextDocument]:
        """The documents from that file on.

        Raises:
            UserError: a file cannot be read or parsed, or has not the fields asked for.
        """
        for part, file in enumerate(self.files):
            if part >= first_part:
                try:
                    yield from self._read(file, part)
                except READ_ERRORS as error:
                    raise UserError(f"input {file.name} cannot be read: {error}; copy or compress it again") from error

    def shuffled(self, seed: int) -> FileSource:
        """The files in another order."""
        return replace(self, files=[self.files[number] for number in permutation(len(self.files), seed)])

    def _read(self, file: SourceFile, part: int) -> Iterator[TextDocument]:
        if file.path is None:
            yield from self._read_stdin(part)
            return
        with file.path.open("rb") as raw:
            name = plain_name(file.name)
            if name.endswith(PARQUET_SUFFIX) or raw.peek(len(PARQUET_MAGIC)).startswith(PARQUET_MAGIC):
                yield from _read_parquet(file.path, file.name, self.fields, part)
                return
            is_lines = name.endswith(JSONL_SUFFIXES)
            if name.endswith(JSON_SUFFIX):
                is_lines = looks_compressed(file.name) or _json_is_lines(
                    decompressed(raw, file.name), file, self.fields.text
                )
                raw.seek(0)
            stream = decompressed(raw, file.name)
            if is_lines:
                yield from _read_jsonl(stream, raw, file.name, self.fields, part)
                return
            if self.fields.prompt or self.fields.split:
                raise UserError(
                    f"input {file.name} is a text file without fields; "
                    "--prompt-field and --split-field need JSONL or Parquet input"
                )
            yield from _read_text(stream, raw, file, part)

    def _read_stdin(self, part: int) -> Iterator[TextDocument]:
        raw = sys.stdin.buffer
        head, stream = peeked(decompressed(raw, "stdin"))
        if self.stdin_format is None and without_bom(head).lstrip().startswith((b'{"', b'{ "')):
            raise UserError(
                "standard input begins like JSON lines; say --format jsonl to read their text field, or --format lines "
                "to take every line as text"
            )
        if self.stdin_format == "jsonl":
            yield from _read_jsonl(stream, raw, "stdin", self.fields, part)
        else:
            yield from _read_lines(stream, part)


def _read_lines(stream: BinaryIO, part: int) -> Iterator[TextDocument]:
    for number, line in lines_of(stream, "stdin"):
        text = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
        yield TextDocument(f"stdin:{number}", text, None, None, len(line), part=part)


def _read_jsonl(stream: BinaryIO, raw: BinaryIO, name: str, fields: Fields, part: int) -> Iterator[TextDocument]:
    """Documents of a JSONL stream; `raw` counts the bytes of the file itself."""
    position = 0
    for number, line in lines_of(stream, name):
        if not line.strip():
            continue
        before, position = position, raw.tell() if raw.seekable() else position + len(line)
        document = TextDocument(f"{name}:{number}", b"", None, None, source_bytes=position - before, part=part)
        try:
            text, prompt, split = parse_fields(line, f"{name} line {number}", fields)
        except BadLine as error:
            yield replace(document, fault=str(error))
        else:
            yield replace(document, text=text, prompt=prompt, split=split)


def _read_text(stream: BinaryIO, raw: BinaryIO, file: SourceFile, part: int) -> Iterator[TextDocument]:
    """The one document of a text file, in pieces of whole characters where it is long."""
    position, begins = 0, True
    held = without_bom(stream.read(PIECE_BYTES))
    if not file.in_folder and (what := other_format(held)):
        raise UserError(f"input {file.name} is {what}, not text; unpack or convert it")
    if not file.in_folder and (encoding := utf_encoding(held)):
        raise UserError(f"input {file.name} is {encoding}, not UTF-8; convert it, as with iconv -f {encoding} -t UTF-8")
    is_text = not (file.in_folder and (is_binary(held) or utf_encoding(held)))
    while True:
        following = stream.read(PIECE_BYTES) if is_text else b""
        end = whole_characters(held) if following else len(held)
        before, position = position, raw.tell() if is_text else raw.seek(0, io.SEEK_END)
        yield TextDocument(
            file.name,
            held[:end],
            None,
            None,
            position - before,
            may_be_binary=file.in_folder,
            part=part,
            begins=begins,
            ends=not following,
        )
        if not following:
            return
        held, begins = held[end:] + following, False


def whole_characters(text: bytes) -> int:
    """Bytes of `text` without a UTF-8 character at its end that is not complete."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:  # the first byte of a character
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(text) - back if back < length else len(text)
    return len(text)


def _json_is_lines(stream: BinaryIO, file: SourceFile, field: str) -> bool:
    """Whether a .json file holds JSON lines; one in a folder that does not is a document itself, such as a setting in a
    folder of code.

    Raises:
        UserError: a file that was given by its name is something else.
    """
    lines = (line for _, line in lines_of(stream, file.name) if line.strip())
    first, more = next(lines, b""), next(lines, None) is not None
    try:
        value = json.loads(first.decode("utf-8", "surrogateescape")) if first else {}
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and (more or field in value or not file.in_folder):
        return True
    if file.in_folder:
        return False
    what = "an array" if first.lstrip().startswith(b"[") else "not JSON lines"
    raise UserError(
        f"input {file.name} is {what}; write each document as one object on a line of its own, as jq -c '.[]' does"
    )


def _read_parquet(path: Path, name: str, fields: Fields, part: int) -> Iterator[TextDocument]:
    require_extra("data", "pyarrow", purpose=f"reading {name}")
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"input {name} is not a Parquet file ({str(error).splitlines()[0]})") from None
    missing = [field for field in fields.names if field not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"{name} has no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}; "
            "name the columns with --field, --prompt-field, --split-field"
        )
    row_bytes = path.stat().st_size / max(file.metadata.num_rows, 1)
    number = 0
    groups = (file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))
    unpacked = max(1, sum(groups) // max(file.metadata.num_rows, 1))
    rows = max(1, min(1024, PARQUET_BATCH_BYTES // unpacked))
    batches = file.iter_batches(batch_size=rows, columns=fields.names)
    while True:
        try:
            batch = next(batches, None)
        except pyarrow.ArrowException as error:
            raise UserError(
                f"input {name} cannot be read: {str(error).splitlines()[0]}; copy or write it again"
            ) from None
        if batch is None:
            return
        columns: dict[str, list[bytes]] = {}
        for field in fields.names:
            try:
                # Strings as bytes: pyarrow would raise on text that is not UTF-8.
                values = batch.column(field).cast(pyarrow.large_binary()).to_pylist()
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
                raise UserError(
                    f"column {field!r} of {name} is {batch.column(field).type}; it must be a string"
                ) from None
            columns[field] = [value or b"" for value in values]
        for row in range(batch.num_rows):
            number += 1
            yield TextDocument(
                f"{name}:{number}",
                columns[fields.text][row],
                None if fields.prompt is None else columns[fields.prompt][row],
                None if fields.split is None else columns[fields.split][row].decode("utf-8", "replace"),
                source_bytes=int(number * row_bytes) - int((number - 1) * row_bytes),
                part=part,
            )
