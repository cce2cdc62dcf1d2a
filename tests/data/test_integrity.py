from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nextlat_dist.data.integrity import ShardChecker, Verify
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, ShardEntry, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, write_dataset


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "data", numbered_documents([50] * 20), shard_tokens=300)
    return tmp_path / "data"


def hashed(dataset: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that a new process would read to hash them."""
    names: list[str] = []
    original = ShardChecker._right

    def count(self: ShardChecker, shard: ShardEntry) -> bool:
        names.append(shard.name)
        return original(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardChecker, "_right", count)
        storage = Records(open_storage(dataset), read_manifest(dataset), verify=verify)
        for _ in range(2):
            for record in range(len(storage)):
                storage.read(record)
    return names


def test_first_hashes_each_shard_once_and_again_when_it_changes(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [shard.name for shard in read_manifest(dataset).shards]
    assert len(names) == 4
    assert hashed(dataset, "first", monkeypatch) == names
    assert hashed(dataset, "first", monkeypatch) == []
    os.utime(dataset / names[1], (1, 1))
    assert hashed(dataset, "first", monkeypatch) == [names[1]]
    copy = shutil.copytree(dataset, dataset.parent / "copy")
    assert hashed(Path(copy), "first", monkeypatch) == names, "a stamp belongs to a full path"


def test_always_and_never(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [shard.name for shard in read_manifest(dataset).shards]
    assert [hashed(dataset, "always", monkeypatch) for _ in range(2)] == [names, names]
    assert hashed(dataset, "never", monkeypatch) == []


def flip_last_byte(path: Path) -> None:
    """Of the padding that ends a tar: no record is damaged."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def test_a_change_outside_all_records_is_found_by_the_hash(dataset: Path) -> None:
    manifest: Manifest = read_manifest(dataset)
    flip_last_byte(dataset / manifest.shards[0].name)
    for verify in ("always", "first"):
        storage = Records(open_storage(dataset), manifest, verify=verify)
        with pytest.raises(UserError, match=r"train-000000\.tar is not the file .*sha256 differs \(its index is"):
            storage.read(0)
        last = len(storage) - 1
        assert storage.read(last).tokens.size, "the other shards are still good"
    assert Records(open_storage(dataset), manifest, verify="never").read(0).tokens.size


def test_a_stamp_is_no_excuse_for_a_shard_that_changed(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed(dataset, "first", monkeypatch)
    manifest = read_manifest(dataset)
    flip_last_byte(dataset / manifest.shards[2].name)
    storage = Records(open_storage(dataset), manifest)
    record = sum(shard.records for shard in manifest.shards[:2])
    assert storage.read(record - 1)
    with pytest.raises(UserError, match="sha256 differs"):
        storage.read(record)


def test_without_a_cache_directory_shards_are_hashed_each_time(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path / "file" / "below"))
    assert [len(hashed(dataset, "first", monkeypatch)) for _ in range(2)] == [4, 4]
