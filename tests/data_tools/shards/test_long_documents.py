"""Documents that are longer than what is tokenised, held or written at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.shards import encode, long_documents, pieces, shard_report, writer
from data_tools.shards import shard as shard_module
from data_tools.shards.shard import ShardOptions, shard
from data_tools.text import sources
from data_tools.text.find import find_files
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.corpora import TEXTS
from tests.kit.datasets import tiny_tokenizer

LONG = "\n".join(TEXTS) * 3
TOKENIZER = tiny_tokenizer()


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Everything that is long is so from a few hundred bytes on."""
    for module in (sources, pieces):
        patch.setattr(module, "PIECE_BYTES", 300)
    patch.setattr(encode, "BATCH_BYTES", 400)
    patch.setattr(long_documents, "SPOOL_TOKENS", 500)
    patch.setattr(long_documents, "CHUNK_TOKENS", 64)
    patch.setattr(writer, "READ_BYTES", 1000)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three text files and the same as JSON lines with prompts, short and long ones in turn."""
    for name, text in {"a.txt": "short", "b.txt": LONG, "c.txt": "end"}.items():
        (tmp_path / name).write_text(text)
    rows = [{"q": "Q? ", "text": text} for text in ("short", LONG, "end")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(corpus: Path, output: str, **changes: object) -> tuple[Manifest, dict[str, bytes]]:
    options = ShardOptions(TOKENIZER, corpus / output, record_tokens=2000, has_prompts=True, **changes)  # type: ignore[arg-type]
    (manifest,) = shard(FileSource(find_files([str(corpus / "rows.jsonl")]), Fields(prompt="q")), options)
    return manifest, {path.name: path.read_bytes() for path in sorted((corpus / output).iterdir())}


def test_a_long_document_gives_the_same_dataset_to_the_byte(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = run(corpus, "whole")
    small_pieces(monkeypatch)
    spooled: list[int] = []
    write_long = writer._Shard.write_long

    def counted(self: writer._Shard, documents: list[long_documents.Tokens], *rest: object) -> None:
        spooled.append(len(documents))
        write_long(self, documents, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(writer._Shard, "write_long", counted)
    assert run(corpus, "pieces")[1] == whole
    assert spooled, "the long document was held in memory"
    assert run(corpus, "workers", workers=2)[1] == whole


def test_a_text_file_in_pieces_is_one_document(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    source = FileSource(find_files([f"{corpus}/*.txt"]))
    (manifest,) = shard(source, ShardOptions(TOKENIZER, corpus / "out", record_tokens=1 << 20))
    record = Records(open_storage(corpus / "out"), manifest).read(0)
    tokenizer = Tokenizer(TOKENIZER)
    expected = [[1, *tokenizer.encode(text), 2] for text in ("short", LONG, "end")]
    assert [part.tolist() for part in _documents(record.tokens, record.ends)] == expected
    assert {remark: manifest.report[remark]["count"] for remark in shard_report.ALWAYS} == dict.fromkeys(
        shard_report.ALWAYS, 0
    )


def _documents(tokens: object, ends: object) -> list:  # type: ignore[type-arg]
    import numpy as np

    return np.split(np.asarray(tokens), np.asarray(ends)[:-1])


def test_a_long_document_that_is_not_utf8_near_its_end_is_left_out_as_a_whole(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    (corpus / "b.txt").write_bytes(LONG.encode() + b"\xff end")
    source = FileSource(find_files([f"{corpus}/*.txt"]))
    (manifest,) = shard(source, ShardOptions(TOKENIZER, corpus / "out", on_invalid="skip"))
    assert manifest.documents == 2
    assert manifest.report["invalid_utf8"] == {"count": 1, "names": ["b.txt"]}
    with pytest.raises(UserError, match=r"b\.txt is not UTF-8"):
        shard(source, ShardOptions(TOKENIZER, corpus / "other", on_invalid="fail"))


def test_a_document_that_training_must_hold_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_module, "LONG_TOKENS", 100)
    manifest, _ = run(corpus, "out")
    assert manifest.report["long"] == {"count": 1, "names": ["rows.jsonl:2"]}


def test_a_truncated_line_is_left_out_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "tw\n{"body": 1}\n[]\n{"text": "three"}\n')
    source = FileSource(find_files([str(tmp_path / "a.jsonl")]))
    with pytest.raises(UserError, match=r"a\.jsonl line 2 is not JSON.*--on-invalid skip"):
        shard(source, ShardOptions(TOKENIZER, tmp_path / "refused"))
    (manifest,) = shard(source, ShardOptions(TOKENIZER, tmp_path / "out", on_invalid="skip"))
    assert manifest.documents == 2
    assert manifest.report["bad_line"] == {"count": 3, "names": ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]}
    assert read_manifest(tmp_path / "out") == manifest


MEASURE = """
import sys
from data_tools.cli import main
status = main(sys.argv[1:])
with open("/proc/self/status") as file:  # not `ru_maxrss`, which begins with what the starting process holds
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
print(status, peak // 1024, file=sys.stderr)
"""


def peak_megabytes(corpus: Path, size: int) -> int:
    """Peak memory of `shard` for one text file of `size` bytes."""
    text = "".join(f"line {number} of a long file: {'word ' * (number % 7)}\n" for number in range(2000)).encode()
    with (corpus / "long.txt").open("wb") as file:
        for _ in range(size // len(text)):
            file.write(text)
    arguments = ["shard", "--input", corpus / "long.txt", "--tokenizer", TOKENIZER, "--output", corpus / "out"]
    command = [sys.executable, "-c", MEASURE, *map(str, arguments), "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    status, peak = result.stderr.splitlines()[-1].split()
    assert status == "0"
    assert read_manifest(corpus / "out").documents == 1
    return int(peak)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_a_document(tmp_path: Path) -> None:
    """52 bytes for every byte before: 60 MB took 3.1 GB."""
    small, large = (tmp_path / name for name in ("small", "large"))
    small.mkdir()
    large.mkdir()
    base = peak_megabytes(small, 10 << 20)
    peak = peak_megabytes(large, 300 << 20)
    assert peak < base + 100, f"{peak} MB for 300 MB, {base} MB for 10 MB"
    assert peak < 1000
