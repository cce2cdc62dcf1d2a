from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.shards.journal import JOURNAL_FILE
from data_tools.shards.shard import ShardOptions, shard
from data_tools.shards.shard_report import describe
from data_tools.text.find import find_files
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource
from data_tools.text.splits import unit_hash
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.corpora import TEXTS, contents
from tests.kit.datasets import tiny_tokenizer

TEXT = Fields()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for number, text in enumerate(TEXTS):
        path = root / f"{number % 5}" / f"{number:03d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def run(source: Path, output: Path, fields: Fields = TEXT, **changes: Any) -> list[Manifest]:
    options = ShardOptions(tokenizer=tiny_tokenizer(), output=output, record_tokens=300, shard_tokens=2000)
    changes = {"split_by_field": fields.split is not None, "has_prompts": fields.prompt is not None, **changes}
    return shard(FileSource(find_files([str(source)]), fields), replace(options, **changes))


def texts_of(dataset: Path) -> list[str]:
    storage, tokenizer = Records(open_storage(dataset), read_manifest(dataset)), Tokenizer(dataset / "tokenizer.model")
    records = [storage.read(number) for number in range(len(storage))]
    return [tokenizer.decode(part) for record in records for part in np.split(record.tokens, record.ends[:-1])]


def test_every_text_comes_back_in_order(corpus: Path, tmp_path: Path) -> None:
    (manifest,) = run(corpus, tmp_path / "out")
    assert texts_of(tmp_path / "out") == [path.read_text() for path in sorted(corpus.rglob("*.py"))]
    assert len(manifest.shards) > 2
    assert manifest.records > 2 * len(manifest.shards)
    assert manifest.documents == len(TEXTS)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tiny_tokenizer().read_bytes()
    assert manifest.tokenizer.sha256 == Tokenizer(tiny_tokenizer()).sha256


def test_sizes_of_records_and_shards_are_kept(corpus: Path, tmp_path: Path) -> None:
    (manifest,) = run(corpus, tmp_path / "out")
    storage = Records(open_storage(tmp_path / "out"), manifest)
    longest = max(int(storage.read(number).lengths.max()) for number in range(len(storage)))
    assert all(300 <= tokens < 300 + longest for tokens in storage.tokens[:-1])
    assert all(2000 <= entry.tokens < 2300 + longest for entry in manifest.shards[:-1])


def test_equal_input_gives_equal_bytes_for_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    expected = None
    for name, workers in (("one", 1), ("again", 1), ("two", 2), ("three", 3)):
        run(corpus, tmp_path / name, validation_fraction=0.2, workers=workers)
        found = contents(tmp_path / name)
        assert any(file.endswith(".tar") for file in found)
        assert not [file for file in found if file.endswith(".tmp")]
        expected = expected or found
        assert found == expected


def test_bytes_depend_on_neither_time_nor_user_nor_place(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                assert (member.uname, member.gname) == ("nextlat", "nextlat")
    texts = [p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix == ".json"]
    assert not any(str(tmp_path) in text for text in texts)


def test_the_split_follows_the_name_alone(corpus: Path, tmp_path: Path) -> None:
    train, validation = run(corpus, tmp_path / "out", validation_fraction=0.3)
    assert train.documents + validation.documents == len(TEXTS)
    held = {p.relative_to(corpus).as_posix() for p in corpus.rglob("*.py")}
    held = {name for name in held if unit_hash(name) < 0.3}
    assert 0.15 < len(held) / len(TEXTS) < 0.45
    assert texts_of(tmp_path / "out/validation") == [(corpus / name).read_text() for name in sorted(held)]
    # Another document in the corpus moves none of the old ones.
    (corpus / "0/new.py").write_text("new")
    run(corpus, tmp_path / "more", validation_fraction=0.3)
    assert set(texts_of(tmp_path / "out/validation")) <= set(texts_of(tmp_path / "more/validation"))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_split_field_decides_and_must_name_a_split(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "part": "validation" if n % 4 == 0 else "train"} for n in range(20)]
    source = write_jsonl(tmp_path / "data.jsonl", rows)
    fields = Fields(split="part")
    run(source, tmp_path / "out", fields)
    for split in ("train", "validation"):
        assert texts_of(tmp_path / "out" / split) == [row["text"] for row in rows if row["part"] == split]
    rows[7]["part"] = "test"
    with pytest.raises(UserError, match=r"data\.jsonl:8 has the split 'test'"):
        run(write_jsonl(source, rows), tmp_path / "other", fields)


def test_prompts_become_masked_lengths(tmp_path: Path) -> None:
    rows = [{"text": "answer", "q": "question " * n} for n in range(5)]
    (manifest,) = run(write_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "out", Fields(prompt="q"))
    assert manifest.has_prompts
    record = Records(open_storage(tmp_path / "out"), manifest).read(0)
    tokenizer = Tokenizer(tiny_tokenizer())
    assert record.prompts is not None
    assert record.prompts.tolist() == [1 + len(tokenizer.encode("question " * n)) for n in range(5)]
    assert texts_of(tmp_path / "out")[3] == "question question question answer"


def test_the_report_counts_what_was_left_out_or_changed(corpus: Path, tmp_path: Path) -> None:
    (corpus / "empty.py").write_bytes(b"")
    (corpus / "latin.py").write_bytes(b"caf\xe9")
    (corpus / "picture.png").write_bytes(b"\x89PNG\0\0")
    for workers in (1, 2):
        (manifest,) = run(corpus, tmp_path / f"out{workers}", workers=workers)
        assert manifest.report["empty"] == {"count": 1, "names": ["empty.py"]}
        assert manifest.report["invalid_utf8"] == {"count": 1, "names": ["latin.py"]}
        assert manifest.report["binary"] == {"count": 1, "names": ["picture.png"]}
        assert manifest.report["not_lossless"]["count"] == 0
        assert manifest.documents == len(TEXTS) + 1
    described = describe(manifest, tmp_path)
    assert "1 documents that are not UTF-8 (replace): latin.py" in described
    (skipped,) = run(corpus, tmp_path / "skip", on_invalid="skip")
    assert (skipped.documents, skipped.report["invalid_utf8"]["count"]) == (len(TEXTS), 1)


def test_long_lists_of_names_are_cut_but_counted(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff")
    (manifest,) = run(tmp_path, tmp_path / "out")
    assert manifest.report["invalid_utf8"]["count"] == 30
    assert len(manifest.report["invalid_utf8"]["names"]) == 20
    assert ", …" in describe(manifest, tmp_path)


def test_input_without_text_is_refused_and_leaves_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes(b"")
    with pytest.raises(UserError, match="no document with text"):
        run(tmp_path / "in", tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_an_empty_split_is_refused_and_leaves_no_manifest(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", [{"text": "x", "split": "train"}])
    with pytest.raises(UserError, match="no document falls into the validation split"):
        run(source, tmp_path / "out", Fields(split="split"))
    assert not [file for file in contents(tmp_path / "out") if file.endswith("manifest.json")]


def test_a_finished_dataset_is_replaced_only_on_request(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="already holds a dataset; pass --overwrite"):
        run(corpus, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    for path in sorted(corpus.rglob("*.py"))[20:]:
        path.unlink()
    run(corpus, tmp_path / "out", overwrite=True)
    assert len(texts_of(tmp_path / "out")) == 20
    assert len(contents(tmp_path / "out")) < len(before), "shards of the old dataset must not stay"


def test_a_replacement_that_fails_leaves_no_manifest_of_the_old_dataset(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out")
    (corpus / "4/zzz.py").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        run(corpus, tmp_path / "out", overwrite=True, on_invalid="fail")
    with pytest.raises(UserError, match="not a finished dataset"):
        read_manifest(tmp_path / "out")


def test_what_an_interrupted_run_left_is_cleared(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "clean")
    stale = tmp_path / "out"
    stale.mkdir()
    for name in ("train-000099.index.npy", ".train-000003.tar.tmp"):
        (stale / name).write_bytes(b"stale")
    shutil.copyfile(tmp_path / "clean" / "train-000000.tar", stale / "train-000099.tar")
    (stale / "notes.txt").write_text("mine")
    run(corpus, stale)
    assert contents(stale).keys() - contents(tmp_path / "clean").keys() == {"notes.txt"}


@pytest.mark.parametrize("kind", ["a tar", "no tar", "a link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_tar_of_somebody_else_is_not_removed(kind: str, overwrite: bool, corpus: Path, tmp_path: Path) -> None:
    """WebDataset's users name theirs like that."""
    run(corpus, tmp_path / "out")
    if not overwrite:
        (tmp_path / "out" / "manifest.json").unlink()
    theirs = tmp_path / "out" / "train-000123.tar"
    if kind == "a tar":
        with tarfile.open(theirs, "w") as tar:
            tar.addfile(tarfile.TarInfo("image.jpg"))
    elif kind == "no tar":
        theirs.write_bytes(b"")
    else:
        theirs.symlink_to(tmp_path / "out" / "train-000000.tar")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds train-000123\.tar, which is no shard of this command"):
        run(corpus, tmp_path / "out", overwrite=overwrite)
    assert contents(tmp_path / "out") == before


def test_an_error_in_the_middle_leaves_no_manifest_and_no_temporary_file(corpus: Path, tmp_path: Path) -> None:
    (corpus / "4/zzz.py").write_bytes(b"\xff")  # the last one
    # The exception is kept, so that nothing is tidied up by mere garbage collection.
    with pytest.raises(UserError, match=r"4/zzz\.py is not UTF-8 at byte 0") as caught:
        run(corpus, tmp_path / "out", on_invalid="fail", record_tokens=50)
    left = contents(tmp_path / "out").keys() - {JOURNAL_FILE}
    assert len(left) > 4
    assert left == {name for n in range(len(left) // 2) for name in (f"train-{n:06d}.tar", f"train-{n:06d}.index.npy")}
    assert caught.value
    with pytest.raises(UserError, match="not a finished dataset"):
        read_manifest(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 0.0}, "--validation-fraction is 0.0"),
        ({"validation_fraction": 1.0}, "--validation-fraction is 1.0"),
        ({"record_tokens": 0}, "--record-tokens is 0"),
        ({"workers": 0}, "--workers is 0"),
    ],
)
def test_values_out_of_range_are_refused(corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(corpus, tmp_path / "out", **changes)


def test_shards_are_plain_tars_with_npy_members(corpus: Path, tmp_path: Path) -> None:
    (manifest,) = run(corpus, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / manifest.shards[0].name) as tar:
        first = tar.extractfile("train-000000-000000.tokens.npy")
        assert first is not None
        assert np.load(io.BytesIO(first.read())).dtype == np.uint16
