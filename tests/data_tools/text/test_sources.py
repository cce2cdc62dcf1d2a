from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_tools.text import sources
from data_tools.text.find import find_files
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource, TextDocument
from nextlat_dist.errors import UserError

TEXT = Fields()


def names(inputs: list[Path | str], include: list[str] | None = None, exclude: list[str] | None = None) -> list[str]:
    return [file.name for file in find_files([str(given) for given in inputs], include or [], exclude or [])]


def documents(path: Path, fields: Fields = TEXT) -> list[TextDocument]:
    return list(FileSource(find_files([str(path)]), fields).documents())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.py", "sub/c.py", "sub/__pycache__/x.py", ".hidden/x.py", ".dot.py", "z/deep/d.md"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "root"


def test_a_folder_gives_its_files_sorted_and_named_from_its_root(folder: Path) -> None:
    assert names([folder]) == ["a.py", "b.txt", "sub/c.py", "z/deep/d.md"]


def test_patterns_choose_files(folder: Path) -> None:
    assert names([folder], ["*.py"]) == ["a.py", "sub/c.py"]
    assert names([folder], ["*.py"], ["sub"]) == ["a.py"]
    assert names([folder], [], ["c.*", "*.txt"]) == ["a.py", "z/deep/d.md"]


def test_globs_and_single_files_are_named_from_their_root(folder: Path) -> None:
    assert names([f"{folder}/*.py"]) == ["a.py"]
    assert names([f"{folder}/**/*.py"]) == ["a.py", "sub/c.py"]
    assert names([folder / "sub/c.py", folder / "a.py"]) == ["c.py", "a.py"]
    assert names(["-"]) == ["stdin"]


def test_inputs_without_files_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="does not exist or has no file"):
        names([folder / "none"])
    with pytest.raises(UserError, match="no file left after --glob"):
        names([folder], ["*.rs"])


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = b" line\r\n\xff \xef\xbb\xbflast"
    (tmp_path / "a.txt").write_bytes(content)
    assert documents(tmp_path) == [TextDocument("a.txt", content, None, None, len(content), may_be_binary=True)]


ROWS = [
    {"text": "eins", "q": "Frage ", "split": "train"},
    {"text": "zwei\n▁", "q": None, "split": "validation"},
    {"text": "", "q": "?", "split": "train"},
]
JSONL = "\n".join(json.dumps(row) for row in ROWS[:2]).encode() + b"\n\n" + json.dumps(ROWS[2]).encode()


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_files_of_many_documents_agree(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}[kind]
        path.write_bytes(compress(JSONL))
    found = documents(path, Fields(prompt="q", split="split"))
    assert [(d.text.decode(), d.prompt.decode() if d.prompt is not None else None, d.split) for d in found] == [
        (row["text"], row["q"] or "", row["split"]) for row in ROWS
    ]
    numbers = (1, 2, 3) if kind == "parquet" else (1, 2, 4)  # lines are counted as an editor counts them
    assert [d.name for d in found] == [f"data.{kind}:{number}" for number in numbers]
    assert sum(d.source_bytes for d in found) == path.stat().st_size
    assert [d.prompt for d in documents(path)] == [None] * 3


def test_two_compressed_files_in_one_are_read_to_the_end(tmp_path: Path) -> None:
    line = b'{"text": "x"}\n'
    for kind, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        path = tmp_path / f"data.jsonl.{kind}"
        path.write_bytes(compress(line) + compress(line))
        assert len(documents(path)) == 2


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_short_is_refused(tmp_path: Path, kind: str) -> None:
    """At every length, also where it is cut between two lines."""
    content = b"".join(b'{"text": "line %d"}\n' % number for number in range(30000))
    packed = (gzip.compress if kind == "gz" else zstandard.compress)(content)
    path = tmp_path / f"data.jsonl.{kind}"
    for cut in (1, 9, len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:cut])
        with pytest.raises(UserError, match=f"data.jsonl.{kind}"):
            documents(path)


def test_bytes_that_are_no_utf8_pass_through_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'{"text": "a\xff\xe2\x96"}\n{"text": "\\ud800"}\n{"text": "\\udcc3\\udca9"}\n{"text": "\\ud83d\\ude00"}'
    )
    found = [d.text for d in documents(path)]
    assert found[:2] == [b"a\xff\xe2\x96", b"\xed\xa0\x80"]
    with pytest.raises(UnicodeDecodeError):  # two escapes that would pass for the bytes of an é
        found[2].decode()
    assert found[3].decode() == "😀"


@pytest.mark.parametrize("line", ["no json", "[1]", '{"body": "x"}', '{"text": 3}', '{"text": "x"'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    good, bad = documents(path)
    assert (good.text, good.fault) == (b"good", None)
    assert "data.jsonl line 2" in str(bad.fault)


def test_large_rows_of_parquet_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    texts = [str(number) * 100_000 for number in range(10)] * 10
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False, compression="none")
    held: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PARQUET_BATCH_BYTES", 350_000)
        iterate = pyarrow.parquet.ParquetFile.iter_batches

        def noted(self: Any, *words: Any, **options: Any) -> Any:
            for batch in iterate(self, *words, **options):
                held.append(batch.num_rows)
                yield batch

        patch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", noted)
        found = [document.text.decode() for document in FileSource(find_files([str(path)])).documents()]
    assert found == texts
    assert max(held) == 3


def test_parquet_without_the_column_or_with_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "text": [3]}), path)
    with pytest.raises(UserError, match="no column 'none', only body, text"):
        documents(path, Fields(text="none"))
    with pytest.raises(UserError, match=r"column 'text' of data\.parquet is int64"):
        documents(path)
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is not a Parquet file"):
        documents(path)


def test_text_files_have_no_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="need JSONL or Parquet"):
        documents(tmp_path, Fields(prompt="q"))


def test_standard_input_by_line_or_as_jsonl(monkeypatch: pytest.MonkeyPatch) -> None:
    files = find_files(["-"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one \r\n\nt\rwo\r\r\nlast\r")))
    assert [(d.name, d.text) for d in FileSource(files, Fields(), "lines").documents()] == [
        ("stdin:1", b"one "),
        ("stdin:2", b""),
        ("stdin:3", b"t\rwo\r"),
        ("stdin:4", b"last\r"),
    ]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(JSONL)))
    assert [d.name for d in FileSource(files, Fields(), "jsonl").documents()] == ["stdin:1", "stdin:2", "stdin:4"]
