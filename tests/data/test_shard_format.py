from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.shard_format import (
    MANIFEST_FILE,
    Record,
    index_name,
    read_index,
    read_manifest,
    token_dtype,
)
from nextlat_dist.data.storage.local import LocalStorage
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, write_dataset


def record(prompts: bool) -> Record:
    ends = np.array([3, 4, 9], np.int64)
    return Record(np.arange(9, dtype=np.uint16), ends, np.array([0, 1, 5], np.int64) if prompts else None)


@pytest.mark.parametrize("prompts", [False, True])
def test_a_record_comes_back_from_its_members(prompts: bool) -> None:
    before = record(prompts)
    after = Record.from_members(before.members())
    for name in ("tokens", "ends", "prompts"):
        left, right = getattr(before, name), getattr(after, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "change",
    [
        {"ends": np.array([3, 3, 9]), "prompts": None},
        {"ends": np.array([3, 2, 9]), "prompts": None},
        {"ends": np.array([3, 4, 8])},
        {"ends": np.array([3, 4, 9], np.int32)},
        {"ends": np.array([], np.int64)},
        {"tokens": np.arange(9, dtype=np.int64)},
        {"tokens": np.zeros((9, 1), np.uint16)},
        {"prompts": np.array([0, 2, 5])},
        {"prompts": np.array([-1, 0, 0])},
        {"prompts": np.array([0, 1])},
    ],
)
def test_arrays_that_are_no_block_of_documents_are_refused(change: dict[str, Any]) -> None:
    arrays = {"tokens": record(True).tokens, "ends": record(True).ends, "prompts": record(True).prompts, **change}
    with pytest.raises(ValueError, match=r"tokens|ends|prompt"):
        Record(**arrays)


def test_a_member_is_never_unpickled() -> None:
    members = record(False).members()
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"no \.npy file of whole numbers"):
        Record.from_members({**members, "tokens.npy": buffer.getvalue()})


def test_tokens_are_stored_in_the_smallest_type() -> None:
    assert (token_dtype(65536), token_dtype(65537)) == (np.uint16, np.uint32)


def test_the_manifest_comes_back_from_its_file(tmp_path: Path) -> None:
    written = write_dataset(tmp_path, numbered_documents([50] * 30), shard_tokens=300)
    assert len(written.shards) > 2
    assert read_manifest(tmp_path) == written
    assert (written.documents, written.tokens) == (30, 1500)
    assert read_manifest(tmp_path).digest == json.loads((tmp_path / MANIFEST_FILE).read_text())["digest"]


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "not a manifest written by"),
        ({"format_version": 99}, "format_version 99"),
        ({"split": "edited"}, "changed after it was written"),
        ({"shards": []}, "changed after it was written"),
        ({"digest": None}, "changed after it was written"),
    ],
)
def test_a_foreign_or_edited_manifest_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_dataset(tmp_path, numbered_documents([10]))
    rewrite(tmp_path / MANIFEST_FILE, **changes)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '"text"', "\x00"])
def test_a_manifest_that_is_something_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(content)
    with pytest.raises(UserError, match="manifest"):
        read_manifest(tmp_path)


def test_a_missing_manifest_names_the_splits_below(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nextlat-data shard"):
        read_manifest(tmp_path)
    write_dataset(tmp_path / "train", numbered_documents([10]))
    with pytest.raises(UserError, match=r"one of its splits \(train\)"):
        read_manifest(tmp_path)


def test_an_index_that_is_missing_or_changed_is_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, numbered_documents([10, 20, 300]))
    shard = manifest.shards[0]
    assert sum(row[3] for row in read_index(LocalStorage(tmp_path), shard)) == shard.tokens
    path = tmp_path / index_name(shard.name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not match manifest"):
        read_index(LocalStorage(tmp_path), shard)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_index(LocalStorage(tmp_path), shard)
