"""Read documents from folders, globs, text files, JSONL, Parquet and standard input, in a fixed order.

A source is a list of parts (here: files) that are read one after the other, so that whole parts can be skipped.

Invariant: names are relative to the input they came from and files are visited in sorted order, so the same data gives
the same documents, names and order on every machine. Text is handed on as the bytes that were there: nothing is
decoded, normalised or dropped here.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from nextlat_dist.errors import UserError, require_extra

STDIN = "-"
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
IGNORED_FOLDER = "__pycache__"


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
    """

    name: str
    text: bytes
    prompt: bytes | None
    split: str | None
    source_bytes: int
    may_be_binary: bool = False
    part: int = 0


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


@dataclass(frozen=True)
class SourceFile:
    """A file to read (`path` None: standard input) and its name relative to the input it came from."""

    path: Path | None
    name: str
    in_folder: bool = False

    @property
    def holds_many(self) -> bool:
        return self.path is None or self.name.endswith((*JSONL_SUFFIXES, PARQUET_SUFFIX))


def find_files(inputs: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[SourceFile]:
    """Files of the inputs (folder, glob, file or `-`), in the order of the inputs, sorted inside each.

    `include` and `exclude` are patterns for the files of folders and globs; a pattern matches the relative path or any
    part of it. Hidden files and `__pycache__` are left out.

    Raises:
        UserError: an input does not exist or has no file.
    """
    files: list[SourceFile] = []
    for given in inputs:
        if given == STDIN:
            files.append(SourceFile(None, "stdin"))
            continue
        path = Path(given)
        if path.is_file():
            files.append(SourceFile(path, path.name))
            continue
        if path.is_dir():
            root, found = path, _walk(path)
        else:
            root = _glob_root(given)
            matches = map(Path, glob.glob(given, recursive=True))
            found = [match for match in matches if match.is_file() and IGNORED_FOLDER not in match.parts]
        relative = [(file, file.relative_to(root).as_posix()) for file in found]
        kept = [
            SourceFile(file, name, in_folder=True)
            for file, name in sorted(relative, key=lambda pair: pair[1])
            if (not include or _matches(name, include)) and not _matches(name, exclude)
        ]
        if not kept:
            why = "has no file left after --glob and --exclude" if found else "does not exist or has no file"
            raise UserError(f"input {given} {why}; change --input")
        files += kept
    return files


def _walk(root: Path) -> list[Path]:
    found: list[Path] = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name != IGNORED_FOLDER]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found


def _glob_root(pattern: str) -> Path:
    """Leading folders of a glob that hold no magic: names are relative to it."""
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, *name.split("/")))


@dataclass(frozen=True)
class FileSource:
    """Documents of files; each file is a part."""

    files: Sequence[SourceFile]
    fields: Fields = Fields()
    stdin_format: Literal["lines", "jsonl"] = "lines"

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
            "--format": self.stdin_format,
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
                except (OSError, EOFError, zlib.error) as error:
                    raise UserError(f"input {file.name} cannot be read: {error}; copy or compress it again") from error

    def _read(self, file: SourceFile, part: int) -> Iterator[TextDocument]:
        if file.path is None:
            lines = self.stdin_format == "lines"
            stream = sys.stdin.buffer
            yield from _read_lines(stream, part) if lines else _read_jsonl(stream, file.name, self.fields, part)
        elif file.name.endswith(JSONL_SUFFIXES):
            with file.path.open("rb") as raw:
                yield from _read_jsonl(raw, file.name, self.fields, part)
        elif file.name.endswith(PARQUET_SUFFIX):
            yield from _read_parquet(file.path, file.name, self.fields, part)
        else:
            if self.fields.prompt or self.fields.split:
                raise UserError(
                    f"input {file.name} is a text file without fields; "
                    "--prompt-field and --split-field need JSONL or Parquet input"
                )
            text = file.path.read_bytes()
            yield TextDocument(file.name, text, None, None, len(text), file.in_folder, part)


def _read_lines(stream: BinaryIO, part: int) -> Iterator[TextDocument]:
    for number, line in enumerate(stream, 1):
        text = line[:-2] if line.endswith(b"\r\n") else line.removesuffix(b"\n")
        yield TextDocument(f"stdin:{number}", text, None, None, len(line), part=part)


def _read_jsonl(raw: BinaryIO, name: str, fields: Fields, part: int) -> Iterator[TextDocument]:
    """Documents of a JSONL stream, decompressed by the end of its name. `raw` counts the bytes of the file itself."""
    position = 0
    for number, line in enumerate(_decompressed(raw, name), 1):
        if not line.strip():
            continue
        values = _json_fields(line, f"{name} line {number}", fields)
        before, position = position, raw.tell() if raw.seekable() else position + len(line)
        yield TextDocument(f"{name}:{number}", *values, source_bytes=position - before, part=part)


def _decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if name.endswith(".zst"):
        require_extra("data", "pyarrow", purpose=f"reading {name}")
        import pyarrow

        # The zstandard module takes a file that was cut short for a complete one.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"))
    return raw


def _json_fields(line: bytes, line_name: str, fields: Fields) -> tuple[bytes, bytes | None, str | None]:
    try:
        # surrogateescape carries bytes that are no UTF-8 through the parser, to be treated like those of a text file.
        raw = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise UserError(f"{line_name} is not JSON ({error}); each line must be one JSON object") from None
    values: dict[str, str] = {}
    for name in fields.names:
        if not isinstance(raw, dict) or name not in raw:
            raise UserError(
                f"{line_name} has no field {name!r}; name the fields with --field, --prompt-field, --split-field"
            )
        if not isinstance(raw[name], str | None):
            raise UserError(f"field {name!r} of {line_name} is a {type(raw[name]).__name__}; it must be a string")
        values[name] = raw[name] or ""
    return (
        text_bytes(values[fields.text]),
        None if fields.prompt is None else text_bytes(values[fields.prompt]),
        None if fields.split is None else values[fields.split],
    )


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
    for batch in file.iter_batches(batch_size=1024, columns=fields.names):
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
