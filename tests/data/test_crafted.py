"""A manifest or an index that somebody made up, with every digest right: one sentence, nothing foreign is opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.crafted_datasets import npy, write_index, write_manifest
from tests.kit.datasets import write_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", [np.arange(4, 4 + length) for length in (30, 40, 50, 60, 70)])
    return tmp_path / "data"


def manifest_of(dataset: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((dataset / "manifest.json").read_text())
    return manifest


def read_all(dataset: Path) -> None:
    storage = open_storage(dataset)
    records = Records(storage, read_manifest(storage))
    for number in range(len(records)):
        records.read(number)


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("shards", 0, "name"), 7, r"shards\[0\]\.name is 7, not of type str"),
        (("shards", 0, "name"), "/etc/passwd", "outside the folder"),
        (("shards", 0, "name"), "file:///etc/passwd", "outside the folder"),
        (("shards", 0, "name"), "http://127.0.0.1:9/x.tar", "outside the folder"),
        (("shards", 0, "name"), "a/../../secret.tar", "outside the folder"),
        (("shards", 0, "name"), "a\0b.tar", r"a\\x00b\.tar', which is not the name of a file"),
        (("shards", 0, "name"), "\x1b[2J.tar", r"\\x1b\[2J\.tar', which is not the name of a file"),
        (("shards", 0, "tokens"), 1.5, "not of type int"),
        (("shards", 0, "tokens"), True, "not of type int"),
        (("shards", 0, "records"), -1, "not a count"),
        (("shards", 0, "bytes"), 2**70, "not a count"),
        (("shards", 0, "more"), 1, "unknown field 'more'"),
        (("shards",), {}, "shards is {}, not of type list"),
        (("tokenizer", "file"), "../tokenizer.model", "outside the folder"),
        (("tokenizer", "vocab_size"), "600", "not of type int"),
        (("tokenizer", "eos_id"), 10**6, "not below"),
        (("tokenizer",), None, "tokenizer is None, not an object"),
        (("members", "kind"), "blocks", "not one of block, tokens, text"),
        (("report", "tars"), [{"entry": {"name": "x"}}], "report.tars"),
        (("report", "empty"), [], "report.empty is"),
        (("bos",), "yes", "bos is 'yes', not of type bool"),
    ],
)
def test_a_manifest_of_other_values_is_one_sentence(dataset: Path, place: Any, value: Any, words: str) -> None:
    manifest = manifest_of(dataset)
    inside: Any = manifest
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    write_manifest(dataset, manifest)
    with pytest.raises(UserError, match=words) as caught:
        read_manifest(dataset)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["floats", "objects", "a row less", "an offset", "a length", "tokens", "crc32"])
def test_an_index_of_other_values_is_one_sentence(dataset: Path, kind: str) -> None:
    manifest = manifest_of(dataset)
    path = dataset / (manifest["shards"][0]["name"].removesuffix(".tar") + ".index.npy")
    table = np.load(path)
    changed = {
        "floats": lambda: table.astype(np.float64),
        "objects": lambda: table.astype(object),
        "a row less": lambda: table[:-1],
        "an offset": lambda: table + np.array([2**40, 0, 0, 0, 0]),
        "a length": lambda: table * np.array([1, -1, 1, 1, 1]),
        "tokens": lambda: table + np.array([0, 0, 0, 2**50, 0]),
        "crc32": lambda: table + np.array([0, 0, 0, 0, 2**33]),
    }[kind]()
    write_index(dataset, manifest, npy(changed))
    write_manifest(dataset, manifest)
    with pytest.raises(UserError, match=r"index .* is not one that `nextlat-data` writes"):
        read_all(dataset)


def test_a_count_that_no_memory_holds_is_one_sentence(dataset: Path) -> None:
    manifest = manifest_of(dataset)
    manifest["shards"][0]["records"] = 10**12
    write_manifest(dataset, manifest)
    with pytest.raises(UserError, match=r"is not one that .*where the manifest has 1000000000000 records"):
        read_all(dataset)


def test_only_what_index_adopted_may_lie_elsewhere(dataset: Path) -> None:
    manifest = manifest_of(dataset)
    name = "http://127.0.0.1:9/x.tar"
    manifest["shards"][0]["name"] = name
    manifest["members"] = {"kind": "text", "member": "txt", "field": None}
    write_manifest(dataset, manifest)
    with pytest.raises(UserError, match="outside the folder"):
        read_manifest(dataset)
    manifest["report"]["tars"] = [{"entry": {"name": name}, "empty": {"count": 0, "names": []}}]
    write_manifest(dataset, manifest)
    assert read_manifest(dataset).shards[0].name == name
