from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.shards.shard_report import describe
from data_tools.tars.adopt import Adopter
from data_tools.tars.index import JOURNAL_FILE, find_tars, index
from data_tools.verify import verify
from nextlat_dist.data.loader import RowLoader
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, MembersEntry, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, tiny_tokenizer, write_dataset
from tests.kit.servers import file_server
from tests.kit.tars import npy, text_files, write_tar

TEXT = MembersEntry("text", "txt")
TOKENS = MembersEntry("tokens", "npy")
TEXTS = [{f"s{n}-{i:03d}": f"document {n} {i} naïve\n" * (1 + i % 5) for i in range(20)} for n in range(3)]


def adopt(
    *inputs: Path | str, output: Path | None = None, members: MembersEntry = TEXT, **changes: Any
) -> tuple[Path, Manifest]:
    tars = find_tars([str(given) for given in inputs], output)
    options = {"split": "train", "bos": True, "eos": True, **changes}
    return tars.output, index(tars, Tokenizer(tiny_tokenizer()), members, **options)


def texts_of(dataset: Path | str) -> list[str]:
    place = open_storage(dataset)
    storage, tokenizer = Records(place, read_manifest(place)), Tokenizer(tiny_tokenizer())
    return [tokenizer.decode(storage.read(number).tokens) for number in range(len(storage))]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number, texts in enumerate(TEXTS):
        write_tar(tmp_path / f"tars/a-{number}.tar", text_files(texts))
    return tmp_path / "tars"


ALL_TEXTS = [text for texts in TEXTS for text in texts.values()]


def test_every_record_that_webdataset_sees_can_be_read(tars: Path) -> None:
    import webdataset

    dataset, manifest = adopt(tars)
    shards = [str(path) for path in sorted(tars.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["txt"].decode() for sample in samples] == texts_of(dataset) == ALL_TEXTS
    assert (manifest.records, manifest.documents) == (60, 60)
    assert manifest.report["ignored_members"] == {"jpg": 60, "pkl": 60}
    assert manifest.report["empty"]["count"] == manifest.report["not_lossless"]["count"] == 0
    assert not (dataset / JOURNAL_FILE).exists()
    storage = Records(open_storage(dataset), manifest)
    assert storage.read(0).tokens.tolist() == [1, *Tokenizer(tiny_tokenizer()).encode(ALL_TEXTS[0]), 2]
    # A range holds the one member: the pictures are never read.
    assert int(storage._length.max()) <= 1024


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_kind(tmp_path: Path, format: int) -> None:
    long = "folder/" * (10 if format == tarfile.USTAR_FORMAT else 40) + "name"
    files = [("./" + long + ".txt", b"one"), ("UPPER.TXT", b"two"), ("README", b"no record"), ("__meta__", b"skipped")]
    files += [("z.json", b"{}"), ("z.txt", b"three"), ("z.b.c", b"")]
    _, manifest = adopt(write_tar(tmp_path / "a.tar", files, format))
    assert texts_of(tmp_path) == ["one", "two", "three"]
    assert manifest.report["ignored_members"] == {"(no extension)": 2, "json": 1, "b.c": 1}


def test_a_field_of_json(tmp_path: Path) -> None:
    files = [(f"{n}.json", json.dumps({"url": "x", "body": f"text {n} é"}).encode()) for n in range(5)]
    adopt(write_tar(tmp_path / "a.tar", files), members=MembersEntry("text", "json", "body"))
    assert texts_of(tmp_path) == [f"text {n} é" for n in range(5)]


@pytest.mark.parametrize("packing", ["pad", "concat"])
def test_adopted_tokens_train(tmp_path: Path, packing: Any) -> None:
    documents = [list(range(10 + n, 20 + 2 * n)) for n in range(30)]
    files = [(f"{n:02d}.npy", npy(ids, "i4")) for n, ids in enumerate(documents)]
    write_tar(tmp_path / "a-0.tar", files[:20])
    write_tar(tmp_path / "a-1.tar", files[20:])
    dataset, manifest = adopt(tmp_path, members=TOKENS, eos=False)
    stream = [token for ids in documents for token in (1, *ids)]
    assert manifest.tokens == len(stream)
    loader = RowLoader(
        dataset,
        sequence_length=15,
        packing=packing,
        global_batch_size=2,
        seed=0,
        shuffle=False,
        data_parallel_rank=0,
        data_parallel_size=1,
        workers=1,
    )
    batches = [loader.next_batch() for _ in range(loader.rows_per_epoch // 2)]
    tokens = np.concatenate([batch.tokens for batch in batches])
    if packing == "concat":
        assert tokens.reshape(-1).tolist() == stream[: tokens.size]
        assert tokens.size > len(stream) - 32
    else:
        assert len(tokens) == 30
        for row, ids in zip(tokens, documents, strict=True):
            assert row[: len(ids) + 1].tolist() == [1, *ids][:16]
    assert batches[0].loss_mask.any()


@pytest.mark.parametrize("packing", ["pad", "concat"])
def test_adopted_text_trains(tars: Path, packing: Any) -> None:
    dataset, manifest = adopt(tars)
    loader = RowLoader(
        dataset,
        sequence_length=31,
        packing=packing,
        global_batch_size=4,
        seed=3,
        shuffle=True,
        data_parallel_rank=0,
        data_parallel_size=1,
        workers=2,
    )
    batches = [loader.next_batch() for _ in range(4)]
    assert all(batch.tokens.shape == (4, 32) for batch in batches)
    assert (np.concatenate([batch.tokens for batch in batches]) == 1).sum() > 4
    assert max(int(batch.tokens.max()) for batch in batches) < manifest.tokenizer.vocab_size


def test_empty_and_changed_documents_are_reported(tmp_path: Path) -> None:
    files = [("a.txt", b"one"), ("b.txt", b""), ("c.txt", b"two")]
    _, manifest = adopt(write_tar(tmp_path / "a.tar", files))
    assert texts_of(tmp_path) == ["one", "two"]
    assert manifest.report["empty"] == {"count": 1, "names": ["b.txt"]}
    files = [("a.npy", npy([5])), ("b.npy", npy([]))]
    _, manifest = adopt(write_tar(tmp_path / "t/a.tar", files), members=TOKENS)
    assert manifest.report["empty"] == {"count": 1, "names": ["b.npy"]}


def test_text_that_does_not_come_back_is_reported(tmp_path: Path) -> None:
    import sentencepiece

    # A vocabulary without byte fallback knows no letter but those of its text.
    model = tmp_path / "small.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abcd bcd"] * 50),
        model_prefix=str(model.with_suffix("")),
        vocab_size=10,
        minloglevel=2,
    )
    write_tar(tmp_path / "t/a.tar", [("a.txt", b"abc"), ("b.txt", b"xyz")])
    manifest = index(find_tars([str(tmp_path / "t")], None), Tokenizer(model), TEXT, split="train", bos=True, eos=True)
    assert manifest.report["not_lossless"] == {"count": 1, "names": ["b.txt"]}
    assert manifest.documents == 2


def index_times(dataset: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in dataset.glob("*.index.npy")}


def changed(before: dict[str, int], dataset: Path) -> set[str]:
    return {name for name, time in index_times(dataset).items() if before.get(name) != time}


def test_a_rerun_reads_only_what_changed(tars: Path) -> None:
    dataset, first = adopt(tars)
    before = index_times(dataset)
    assert adopt(tars)[1].digest == first.digest
    assert changed(before, dataset) == set()
    # Another text of the same size, so that the stamp differs by time alone.
    new = {key: text.replace("document", "DOCUMENT") for key, text in TEXTS[1].items()}
    write_tar(tars / "a-1.tar", text_files(new))
    with pytest.raises(UserError, match=r"a-1\.tar is damaged"):
        texts_of(dataset)
    _, second = adopt(tars)
    assert changed(before, dataset) == {"a-1.index.npy"}
    assert texts_of(dataset)[20:40] == list(new.values())
    before = index_times(dataset)
    (dataset / "a-0.index.npy").unlink()
    (dataset / "a-2.index.npy").write_bytes(b"damaged")
    adopt(tars)
    assert changed(before, dataset) == {"a-0.index.npy", "a-2.index.npy"}
    assert texts_of(dataset)[40:] == ALL_TEXTS[40:]
    before = index_times(dataset)
    assert adopt(tars, eos=False)[1].tokens == second.tokens - 60
    assert len(changed(before, dataset)) == 3
    (tars / "a-1.tar").unlink()
    assert adopt(tars, eos=False)[1].documents == 40


def test_a_run_that_was_stopped_goes_on(tars: Path) -> None:
    good = (tars / "a-2.tar").read_bytes()
    (tars / "a-2.tar").write_bytes(good[:-20000])
    with pytest.raises(UserError, match=r"a-2\.tar is damaged"):
        adopt(tars)
    assert not (tars / "manifest.json").exists()
    before = index_times(tars)
    assert set(before) == {"a-0.index.npy", "a-1.index.npy"}
    with (tars / JOURNAL_FILE).open("a") as journal:
        journal.write('{"entry": {"na')  # killed while writing
    (tars / "a-2.tar").write_bytes(good)
    adopt(tars)
    assert changed(before, tars) == {"a-2.index.npy"}
    assert texts_of(tars) == ALL_TEXTS
    assert not (tars / JOURNAL_FILE).exists()


def test_tars_elsewhere_are_linked_not_copied(tars: Path, tmp_path: Path) -> None:
    (tars / "b").mkdir()
    shutil.copy(tars / "a-0.tar", tars / "b/a-0.tar")  # the same name in another folder
    before = sorted(tars.rglob("*"))
    for _ in range(2):
        dataset, manifest = adopt(tars / "b", str(tars / "a-{0..1}.tar"), output=tmp_path / "out")
    assert sorted(tars.rglob("*")) == before
    assert [shard.name for shard in manifest.shards] == ["b/a-0.tar", "a-0.tar", "a-1.tar"]
    assert (dataset / "a-0.tar").is_symlink()
    assert texts_of(dataset) == [*TEXTS[0].values(), *TEXTS[0].values(), *TEXTS[1].values()]
    (dataset / "a-1.tar").unlink()
    (dataset / "a-1.tar").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"a-1\.tar exists and is no link"):
        adopt(tars, output=tmp_path / "out")
    assert (dataset / "a-1.tar").read_bytes() == b"something else"


def test_remote_tars_stay_where_they_are(tars: Path, tmp_path: Path) -> None:
    with file_server(tars) as server:
        url = f"http://{server.address}"
        dataset, manifest = adopt(f"{url}/a-{{0..2}}.tar", output=tmp_path / "out")
        assert [shard.name for shard in manifest.shards] == [f"{url}/a-{number}.tar" for number in range(3)]
        assert len(list(dataset.glob("a-?-*.index.npy"))) == 3
        assert texts_of(dataset) == ALL_TEXTS
        again, other = adopt(f"{url}/a-{{0..2}}.tar", output=tmp_path / "out")
        assert (again, other.digest) == (dataset, manifest.digest)
        with pytest.raises(UserError, match=r"a-3\.tar does not exist"):
            adopt(f"{url}/a-3.tar", output=tmp_path / "other")


def test_a_truncation_anywhere_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"text " * 150 * n) for n in range(4)])
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) + 511 >> 9 << 9
    for size in [*range(0, end + 1024, 512), end - 100, end + 700]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a\.tar is damaged: it (is|ends)|is damaged: unexpected end"):
            adopt(path)
    path.write_bytes(data[: end + 1024])
    assert adopt(path)[1].documents == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda data: data[:1536] + b"\1" * 512 + data[2048:], "the header at offset 1536 is damaged"),
        (lambda data: data + data, "data follows its end at offset"),
        (lambda data: b"\x1f\x8b\x08\x00" + data[4:], "is no plain tar"),
        (lambda data: b"text\n" * 1000, "is no plain tar"),
    ],
)
def test_what_readers_skip_without_a_word_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"text " * 150) for n in range(4)])
    path.write_bytes(make(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        adopt(path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("files", "members", "message"),
    [
        ([("a.b.txt", b"x"), ("a.c.txt", b"y")], TEXT, r"a\.b\.txt and a\.c\.txt in .* collide.*one record 'a'"),
        ([("a.txt", b"x"), ("a.TXT", b"y")], TEXT, r"a\.txt and a\.TXT in .* have the same name"),
        ([("a.txt", b"x"), ("a.txt", b"y")], TEXT, r"a\.txt and a\.txt in .* have the same name"),
        ([("a.txt", b"x"), ("b.txt", b"y"), ("a.json", b"")], TEXT, r"record 'a' comes twice in .* with a\.json"),
        (
            [("b.text", b"y"), ("b.jpg", b"")],
            TEXT,
            r"no document in members \.txt, only 1 jpg, 1 text; name another",
        ),
        ([("a.txt", b"x"), ("b.txt", b"caf\xe9")], TEXT, r"b\.txt in .*a\.tar cannot be used: .* UTF-8 at byte 3"),
        ([("a.npy", npy([5, 600]))], TOKENS, r"a\.npy in .* token id 600 .* vocabulary of 600 ids"),
        ([("a.npy", b"cposix\nabort\n(tR.")], TOKENS, "no .npy file"),
        ([("a.json", b'{"body": "x"}')], MembersEntry("text", "json", "text"), "no field 'text', only body"),
        ([("a.txt", b""), ("b.txt", b"")], TEXT, "hold no document"),
        ([], TEXT, "hold no document"),
    ],
)
def test_wrong_records_are_refused(
    tmp_path: Path, files: list[tuple[str, bytes]], members: MembersEntry, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        adopt(write_tar(tmp_path / "a.tar", files), members=members)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_records_without_the_member_are_left_out_and_counted(tmp_path: Path) -> None:
    files = [("a.jpg", b"1"), ("b.txt", b"text"), ("b.jpg", b"2"), ("c.json", b"{}"), ("d.txt", b"more")]
    dataset, manifest = adopt(write_tar(tmp_path / "a.tar", files))
    assert texts_of(dataset) == ["text", "more"]
    assert manifest.report["without"] == {"count": 2, "names": ["a", "c"]}
    assert "2 records without the member left out: a, c" in describe(manifest, dataset)
    assert verify(str(dataset)).problems == []


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
def test_files_with_holes_are_read_as_plain_webdataset_reads_them(tmp_path: Path, form: str) -> None:
    """`tar -S` stores them without their zeros."""
    ids = np.zeros(60_000, np.int64)
    ids[:3], ids[-3:] = [10, 11, 12], [20, 21, 22]
    for name, array in {"a": np.arange(5, 9), "b": ids, "c": np.arange(9, 12)}.items():
        with (tmp_path / f"{name}.npy").open("wb") as file:
            raw = npy(array.tolist())
            for at in range(0, len(raw), 4096):
                block = raw[at : at + 4096]
                file.seek(len(block), os.SEEK_CUR) if not any(block) else file.write(block)
    names = ["a.npy", "b.npy", "c.npy"]
    command = ["tar", "-C", str(tmp_path), "-S", f"--format={form}", "-cf", str(tmp_path / "a.tar"), *names]
    subprocess.run(command, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 100_000, "this file system has no holes"
    dataset, manifest = adopt(tmp_path / "a.tar", output=tmp_path / "out", members=TOKENS, bos=False, eos=False)
    records = Records(open_storage(dataset), manifest)
    assert [records.read(number).tokens.tolist() for number in range(3)] == [[5, 6, 7, 8], ids.tolist(), [9, 10, 11]]
    assert verify(str(dataset)).problems == []


def test_a_byte_order_mark_before_json_is_dropped(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.json", b'\xef\xbb\xbf{"text": "x y"}')])
    dataset, _ = adopt(path, members=MembersEntry("text", "json", "text"))
    assert texts_of(dataset) == ["x y"]


def test_wrong_places_are_refused(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "b.tar", [("a.txt", b"x")])
    cases: list[tuple[list[str], Path | None, str]] = [
        ([str(tmp_path / "none.tar")], None, "does not exist"),
        ([str(tmp_path / "empty")], None, "holds no .tar"),
        ([str(tars), str(tmp_path / "b.tar")], None, "several folders.*--output"),
        ([str(tars), "http://host/a.tar"], tmp_path, "is remote and other tars are local"),
        (["http://host/a.tar"], None, "--output"),
        (["http://host/a"], tmp_path, r"is not the URL of a \.tar"),
        (["http://host/a.tar?key=secret"], tmp_path, r"^http://host/a\.tar is given with a password or a query"),
        (["http://me:secret@host/a.tar"], tmp_path, r"^host/a\.tar is given with a password or a query"),
        ([str(tars)], Path("s3://bucket/x"), "--output s3:.* is remote"),
    ]
    for inputs, output, message in cases:
        with pytest.raises(UserError, match=message):
            find_tars(inputs, output)
    write_dataset(tmp_path / "own", numbered_documents([40] * 8))
    with pytest.raises(UserError, match="holds a dataset of its own"):
        adopt(tmp_path / "own", members=MembersEntry("tokens", "tokens.npy"))


def test_a_tar_that_changes_while_it_is_read_is_refused(tars: Path) -> None:
    _, manifest = adopt(tars)
    shard = manifest.shards[0]
    adopter = Adopter(replace(manifest, shards=()), tiny_tokenizer().read_bytes())
    adopter(open_storage(tars), shard.name, shard.bytes, lambda count: None)
    with pytest.raises(UserError, match=r"a-0\.tar was changed while it was read"):
        adopter(open_storage(tars), shard.name, shard.bytes, lambda count: os.utime(tars / shard.name))


def test_settings_are_recorded(tars: Path) -> None:
    _, manifest = adopt(tars, split="validation", bos=False)
    assert (manifest.split, manifest.bos, manifest.eos, manifest.has_prompts) == ("validation", False, True, False)
    assert asdict(read_manifest(tars).members) == {"kind": "text", "member": "txt", "field": None}
