from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard

from data_tools.text import json_lines
from data_tools.text.find import find_files
from data_tools.text.sources import FileSource, TextDocument
from nextlat_dist.errors import UserError

BOM = b"\xef\xbb\xbf"
LINES = b"".join(json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(3))
TEXTS = [b"line 0", b"line 1", b"line 2"]


def documents(path: Path) -> list[TextDocument]:
    return list(FileSource(find_files([str(path)])).documents())


def texts(path: Path, content: bytes) -> list[bytes]:
    path.write_bytes(content)
    found = documents(path)
    assert sum(document.source_bytes for document in found) == len(content)
    return [document.text for document in found]


def long_window(content: bytes) -> bytes:
    """As `zstd --long=28` writes to a pipe: the frame does not say its size."""
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return compressor.compress(content) + compressor.flush()


SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c4-train.00000-of-01024.json.gz", gzip.compress(LINES, mtime=0)),
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("a.JSONL", LINES),
        ("a.jsonl", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.gzip", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.XZ", lzma.compress(LINES)),
        ("a.jsonl.zst", long_window(LINES)),
        ("a.jsonl.zstd", SKIPPED + zstandard.compress(LINES) + zstandard.compress(b"") + SKIPPED),
        ("a.jsonl", BOM + LINES),
    ],
)
def test_json_lines_are_read_for_what_they_are(tmp_path: Path, name: str, content: bytes) -> None:
    assert texts(tmp_path / name, content) == TEXTS


def test_compressed_text_is_text(tmp_path: Path) -> None:
    assert texts(tmp_path / "a.txt.gz", gzip.compress(BOM + b"plain", mtime=0)) == [b"plain"]
    assert texts(tmp_path / "b.txt", BOM + b"plain" + BOM) == [b"plain" + BOM]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", LINES, "not those of gzip"),
        ("a.jsonl.zst", b"", "is empty"),
        ("a.jsonl.bz2", bz2.compress(LINES)[:-4], "cannot be read"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-4], "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-4], "cannot be read"),
        ("a.txt", b"PK\x03\x04rest", "zip archive"),
        ("a.txt", b"\xff\xfeA\0", "is UTF-16, not UTF-8"),
        ("a.txt", b"\xfe\xff\0A", "is UTF-16, not UTF-8"),
        ("a.txt.gz", gzip.compress(b"\xff\xfe\0\0A\0\0\0", mtime=0), "is UTF-32, not UTF-8"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}]', "is an array"),
        ("a.json", b'{\n "text": "a"\n}\n', "not JSON lines"),
    ],
)
def test_what_cannot_be_read_is_named_and_never_taken_for_text(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        documents(tmp_path / name)
    assert name in str(caught.value)


def test_a_setting_in_a_folder_of_code_is_a_document(tmp_path: Path) -> None:
    content = b'{\n "name": "package"\n}\n'
    (tmp_path / "package.json").write_bytes(content)
    (tmp_path / "web.json").write_bytes(LINES)
    assert [(each.name, each.text) for each in documents(tmp_path)] == [
        ("package.json", content),
        *[(f"web.json:{number}", text) for number, text in enumerate(TEXTS, 1)],
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'[{"text": "a"}]', "line 1 is an array"),
        (b'{"text": ["a"]}', "is an array; it must be a string"),
        (b'{"text": true}', "is true or false"),
        (b'{"text": "a", "meta": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested too deeply"),
        (b"{", "several lines"),
    ],
)
def test_a_line_of_another_shape_is_described(tmp_path: Path, line: bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    (found,) = documents(tmp_path / "a.jsonl")
    assert words in str(found.fault)


def test_a_number_of_any_length_is_no_obstacle(tmp_path: Path) -> None:
    assert texts(tmp_path / "a.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}") == [b"a"]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LINE_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * 100_000, mtime=0))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz line 1 is longer"):
        documents(tmp_path / "a.jsonl.gz")


def read_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes, form: str | None = None) -> list[bytes]:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    source = FileSource(find_files(["-"]), stdin_format=form)  # type: ignore[arg-type]
    return [document.text for document in source.documents()]


def test_json_on_standard_input_must_be_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (LINES, BOM + LINES, gzip.compress(LINES, mtime=0)):
        with pytest.raises(UserError, match="--format jsonl"):
            read_stdin(monkeypatch, content)
        assert read_stdin(monkeypatch, content, "jsonl") == TEXTS
    assert read_stdin(monkeypatch, LINES, "lines")[0] == b'{"text": "line 0"}'
    assert read_stdin(monkeypatch, BOM + b"one\ntwo\n") == [b"one", b"two"]
