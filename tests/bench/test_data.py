"""The benchmark measures what it says, on the data it says. What the numbers are is not tested."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nextlat_dist.bench import data
from nextlat_dist.bench.loading import (
    HEADLINE,
    Setting,
    open_loader,
    random_documents,
    reader,
    settings,
    webdataset_reader,
    write_blocks,
    write_documents,
)
from nextlat_dist.bench.resuming import SETTING, multiply, resume
from nextlat_dist.bench.sharding import stdlib_texts
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from tests.kit.datasets import tiny_tokenizer

SUMMARY = {
    "tokens_per_second_per_core",
    "tokens_per_cpu_second",
    "ratio_to_webdataset",
    "resume_seconds",
    "shard_ratio_to_sentencepiece",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_the_command_prints_a_table_and_writes_the_same_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nextlat_dist.bench.data", "--quick", "--json", str(tmp_path / "data.json")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    content = json.loads((tmp_path / "data.json").read_text())
    assert {"command", "machine", "versions", "summary", "rows"} <= set(content)
    assert set(content["summary"]) == SUMMARY
    assert all(value > 0 for value in content["summary"].values())
    assert content["versions"]["webdataset"]
    assert len(content["rows"]) == len(settings()) + 6
    for row in content["rows"]:
        assert row["measurement"] in result.stdout
        assert (row["tokens_per_second"] or row["seconds"]) > 0
    total = 2 + 3 * (len(settings()) + 3) + 4
    assert content["machine"]["cores"] == len(os.sched_getaffinity(0)), "pinned while it measures, not when it reports"
    assert f"{total}/{total}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
    assert not any(Path(os.environ["NEXTLAT_CACHE"]).iterdir()), "temporary files are not worth remembering"


def test_the_sizes_reach_sample_ten_million_of_two_billion_tokens() -> None:
    sizes = data.DataSizes()
    assert sizes.resume_tokens == 2_000_000_000
    assert sizes.resume_sample == 10_000_000
    assert sizes.resume_tokens // (SETTING.sequence_length + 1) > sizes.resume_sample


def test_documents_are_about_as_long_as_they_are_said_to_be() -> None:
    documents = random_documents(1 << 22, 4096)
    lengths = np.array([len(document) for document in documents])
    assert lengths.sum() == 1 << 22
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(1000, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(1, rel=0.05)
    assert {document.dtype for document in documents} == {np.dtype(np.uint16)}


def test_both_methods_read_the_same_documents(tmp_path: Path) -> None:
    import webdataset

    documents = random_documents(200_000, 600)
    write_blocks(tmp_path / "blocks", documents, Tokenizer(tiny_tokenizer()), 100_000)
    write_documents(tmp_path / "documents", documents)
    storage = Records(open_storage(tmp_path / "blocks"), read_manifest(tmp_path / "blocks"))
    ours = [part for r in map(storage.read, range(len(storage))) for part in np.split(r.tokens, r.ends[:-1])]
    shards = sorted(str(path) for path in (tmp_path / "documents").iterdir())
    theirs = [sample["npy"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode()]
    for methods in zip(documents, ours, theirs, strict=True):
        assert len({(read.dtype, read.tobytes()) for read in methods}) == 1
    assert webdataset_reader(tmp_path / "documents")() == 200_000
    loader = open_loader(tmp_path / "blocks", HEADLINE, global_batch_size=64)
    assert reader(loader, HEADLINE, 2)() == 2 * 64 * 1025
    assert loader.cursor.row == 128


def test_padding_does_not_count_as_tokens(tmp_path: Path) -> None:
    write_blocks(tmp_path, [np.full(100, 5, np.uint16)] * 256, Tokenizer(tiny_tokenizer()), 10_000)
    setting = Setting("pad", 1024)
    assert reader(open_loader(tmp_path, setting, global_batch_size=64), setting, 1)() == 64 * 100


def test_a_multiplied_dataset_is_a_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = random_documents(200_000, 600)
    write_blocks(tmp_path, documents, Tokenizer(tiny_tokenizer()), 200_000)
    (shard,) = read_manifest(tmp_path).shards
    assert multiply(tmp_path, 900_000) == 5
    manifest = read_manifest(tmp_path)
    assert manifest.tokens == 1_000_000
    assert len({entry.name for entry in manifest.shards}) == 5
    for entry in manifest.shards:
        assert hashlib.sha256((tmp_path / entry.name).read_bytes()).hexdigest() == entry.sha256
    storage = Records(open_storage(tmp_path), manifest)
    assert len(storage) == 5 * shard.records
    for number in range(len(storage)):
        np.testing.assert_array_equal(storage.read(number).tokens, storage.read(number % shard.records).tokens)
    resume(str(tmp_path), 7000)
    seconds = json.loads(capsys.readouterr().out)
    assert seconds["seconds"] >= seconds["open"] > 0


def test_texts_are_pages_of_the_standard_library() -> None:
    texts = stdlib_texts(100_000)
    assert 100_000 <= sum(map(len, texts)) < 1_000_000
    assert all(text.strip() and len(text) < 10_000 for text in texts)
