from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.tars.index import find_tars, index
from data_tools.verify import Problem, verify
from nextlat_dist.data.shard_format import (
    MANIFEST_FILE,
    IndexEntry,
    Manifest,
    MembersEntry,
    index_bytes,
    manifest_bytes,
    read_index,
    read_manifest,
)
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer, write_dataset
from tests.kit.servers import file_server
from tests.kit.tars import text_files, write_tar

SHARDS = ["train-000000.tar", "train-000001.tar", "train-000002.tar"]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    documents = [np.arange(5, 45) + 5 * number for number in range(24)]
    manifest = write_dataset(tmp_path / "data", documents, tokenizer=Tokenizer(tiny_tokenizer()), shard_tokens=320)
    assert [shard.name for shard in manifest.shards] == SHARDS
    assert {shard.records for shard in manifest.shards} == {4}
    return tmp_path / "data"


@pytest.fixture
def adopted(tmp_path: Path) -> Path:
    texts = {f"{number}": "" if number == 3 else f"text {number} " * 9 for number in range(6)}
    write_tar(tmp_path / "adopted/a.tar", text_files(texts))
    tars = find_tars([str(tmp_path / "adopted")], None)
    index(tars, Tokenizer(tiny_tokenizer()), MembersEntry("text", "txt"), split="train", bos=True, eos=True)
    return tmp_path / "adopted"


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


def rewrite(dataset: Path, change: Callable[[Manifest], Manifest]) -> None:
    """A manifest with a good digest and other content."""
    (dataset / MANIFEST_FILE).write_bytes(manifest_bytes(change(read_manifest(dataset))))


def write_index(adopted: Path, table: list[list[int]]) -> None:
    """Another index, with its hash in the manifest."""
    data = index_bytes([IndexEntry(*row) for row in table])
    (adopted / "a.index.npy").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    rewrite(adopted, lambda m: replace(m, shards=(replace(m.shards[0], index_sha256=digest),)))


def offset_of(dataset: Path, record: int, shard: int = 0) -> int:
    return int(read_index(open_storage(dataset), read_manifest(dataset).shards[shard])[record, 0])


def problems(dataset: Path) -> list[str]:
    return [str(problem) for problem in verify(str(dataset)).problems]


def test_what_was_written_is_clean(dataset: Path, adopted: Path) -> None:
    result = verify(str(dataset))
    assert result.problems == []
    assert (result.shards, result.records, result.documents, result.tokens) == (3, 12, 24, 960)
    assert result.bytes == sum((dataset / shard).stat().st_size for shard in SHARDS)
    assert problems(adopted) == []
    with file_server(dataset) as server:
        assert verify(f"http://{server.address}") == replace(result, dataset=f"http://{server.address}")


def test_all_problems_are_listed_with_shard_and_record(dataset: Path) -> None:
    for record in (1, 3):
        flip(dataset / SHARDS[0], offset_of(dataset, record) + 700)
    (dataset / SHARDS[1]).unlink()
    (dataset / "train-000002.index.npy").unlink()
    flip(dataset / SHARDS[2], 600)
    (dataset / "tokenizer.model").write_bytes(b"another")
    found = verify(str(dataset)).problems
    assert [(problem.shard, problem.record) for problem in found] == [
        (None, None),
        (SHARDS[0], 1),
        (SHARDS[0], 3),
        (SHARDS[0], None),
        (SHARDS[1], None),
        (SHARDS[2], None),
        (SHARDS[2], None),
    ]
    said = [problem.problem for problem in found]
    for text, fragment in zip(
        said, ["tokenizer", "crc32", "crc32", "sha256", "missing", "index", "sha256"], strict=True
    ):
        assert fragment in text
    assert str(found[1]).startswith(f"shard {SHARDS[0]}: record 1: ")


def test_a_flip_anywhere_is_found(dataset: Path) -> None:
    """Headers, padding, payload, end blocks of shards; indices; manifest; tokenizer."""
    generator = np.random.default_rng(0)
    for path in sorted(dataset.iterdir()):
        good = path.read_bytes()
        for byte in generator.integers(0, len(good), 6):
            flip(path, int(byte))
            assert problems(dataset), (path.name, byte)
            path.write_bytes(good)
    assert not problems(dataset)


def test_a_damaged_header_hides_no_record(dataset: Path) -> None:
    """webdataset silently stops there; the records after it are still checked."""
    flip(dataset / SHARDS[0], offset_of(dataset, 1) + 150)
    flip(dataset / SHARDS[0], offset_of(dataset, 3) + 700)
    found = verify(str(dataset)).problems
    assert [problem.record for problem in found if problem.record is not None] == [1, 3]
    assert any("plain webdataset finds 1 records in it, not 4" in problem.problem for problem in found)


def test_a_shard_cut_short_or_longer(dataset: Path) -> None:
    path = dataset / SHARDS[0]
    good = path.read_bytes()
    cut = offset_of(dataset, 2)
    path.write_bytes(good[:cut])
    found = problems(dataset)
    assert f"has {cut} bytes where the manifest says {len(good)}" in found[0]
    assert [number for number in range(4) if any(f"record {number}: " in text for text in found)] == [2, 3]
    path.write_bytes(good + bytes(512))
    assert len(problems(dataset)) == 2


def test_a_manifest_that_lies_is_found(dataset: Path, adopted: Path) -> None:
    manifest = read_manifest(dataset)
    first = manifest.shards[0]
    cases: list[tuple[Callable[[Manifest], Manifest], str]] = [
        (lambda m: replace(m, tokenizer=replace(m.tokenizer, vocab_size=100)), "token id .* has 100 ids"),
        (lambda m: replace(m, shards=(replace(first, documents=9), *m.shards[1:])), "index counts 8 documents"),
        (lambda m: replace(m, shards=(replace(first, sha256="0" * 64), *m.shards[1:])), "sha256"),
        (lambda m: replace(m, members=MembersEntry("tokens", "ids.npy")), "no member ids.npy"),
    ]
    for change, message in cases:
        rewrite(dataset, change)
        assert any(re.search(message, text) for text in problems(dataset)), message
        rewrite(dataset, lambda _: manifest)
    assert problems(dataset) == []
    # An index that agrees with the manifest, but counts other tokens than the record has.
    table = read_index(open_storage(adopted), read_manifest(adopted).shards[0]).tolist()
    table[1][3] += 1
    table[2][3] -= 1
    write_index(adopted, table)
    found = verify(str(adopted)).problems
    assert [problem.record for problem in found] == [1, 2]
    assert "its index says 1 and" in found[0].problem


@pytest.mark.parametrize("begin", [0, 1, 7])
def test_an_index_with_records_out_of_order_is_found(begin: int, adopted: Path) -> None:
    table = read_index(open_storage(adopted), read_manifest(adopted).shards[0]).tolist()
    table[-1][0] = begin
    write_index(adopted, table)
    (found,) = verify(str(adopted)).problems
    assert found.record == len(table) - 1
    assert f"its index has it begin at byte {begin}, before " in found.problem


def test_adopted_tars_are_checked_as_webdataset_sees_them(adopted: Path) -> None:
    rewrite(adopted, lambda m: replace(m, report={**m.report, "tars": []}))
    assert "plain webdataset finds 6 records in it, not 5" in problems(adopted)[0]
    # Damage outside every record's range is damage too.
    flip(adopted / "a.tar", 700)
    assert "sha256" in problems(adopted)[-1]
    (adopted / "tokenizer.model").unlink()
    assert "tokenizer.model cannot be read" in problems(adopted)[0]


def test_what_cannot_be_trusted_is_not_counted(dataset: Path) -> None:
    manifest = dataset / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"documents": 8', '"documents": 9', 1))
    result = verify(str(dataset))
    assert [problem.shard for problem in result.problems] == [None]
    assert "was changed after it was written" in result.problems[0].problem
    assert result.tokens is None
    manifest.unlink()
    with pytest.raises(UserError, match="not a finished dataset"):
        verify(str(dataset))


def test_problems_read_well() -> None:
    assert str(Problem("it is gone")) == "it is gone"
    assert str(Problem("it is gone", "a.tar", 0)) == "shard a.tar: record 0: it is gone"


def test_the_report_is_json(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_tools.cli import main

    report = tmp_path / "new/report.json"
    shutil.copytree(dataset, tmp_path / "good")
    assert main(["verify", str(tmp_path / "good"), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["clean"] is True
    flip(dataset / SHARDS[0], 600)
    assert main(["verify", str(tmp_path / "good"), str(dataset), "--json", str(report)]) == 1
    raw = json.loads(report.read_text())
    assert raw["clean"] is False
    assert [len(found["problems"]) for found in raw["datasets"]] == [0, 2]
    assert raw["datasets"][1]["problems"][0] == {
        "problem": raw["datasets"][1]["problems"][0]["problem"],
        "shard": SHARDS[0],
        "record": 0,
    }
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{tmp_path / 'good'}: 3 shards, 12 records, 24 documents, 960 tokens, ")
    assert out[0].endswith(": no problems")
    assert out[-1] == "2 problems"


def test_a_fault_of_our_own_check_is_no_damage(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def broken(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:  # while plain webdataset reads along
            raise KeyError("planted")

    monkeypatch.setattr("data_tools.verify._ShardCheck._check_record", broken)
    with pytest.raises(KeyError, match="planted"):
        verify(str(dataset))
