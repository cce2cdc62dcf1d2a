"""Storages by the scheme of a URL, and one that another distribution brings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nextlat_dist.data.loader import RowLoader
from nextlat_dist.data.storage.catalogue import BUILT_IN, storage_entry
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, write_dataset

MODULE = """
from fsspec.implementations.memory import MemoryFileSystem
from nextlat_dist.data.storage.catalogue import StorageEntry

class Shelf(MemoryFileSystem):
    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("shelf://", "memory://"))

def open_files(timeout_seconds):
    return Shelf()

entry = StorageEntry("shelf", open_files, "fsspec", "shelf-storage")
missing = StorageEntry("missing", open_files, "no_such_package", "missing-storage")
wrong = "no entry"
"""


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution with storages of its own."""
    folder = tmp_path / "installed"
    (folder / "shelf_storage-1.0.dist-info").mkdir(parents=True)
    (folder / "shelf_storage.py").write_text(MODULE)
    (folder / "shelf_storage-1.0.dist-info" / "METADATA").write_text("Name: shelf-storage\nVersion: 1.0\n")
    points = "".join(
        f"{scheme} = shelf_storage:{name}\n"
        for scheme, name in (("shelf", "entry"), ("missing", "missing"), ("wrong", "wrong"))
    )
    (folder / "shelf_storage-1.0.dist-info" / "entry_points.txt").write_text(f"[nextlat_dist.storages]\n{points}")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("shelf_storage", None)


def batch(dataset: Path | str) -> np.ndarray:
    loader = RowLoader(
        dataset,
        sequence_length=16,
        packing="concat",
        global_batch_size=4,
        seed=7,
        shuffle=True,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    return loader.next_batch().tokens


def test_a_storage_of_another_distribution_is_trained_from(tmp_path: Path, distribution: Path) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    write_dataset(tmp_path / "local", numbered_documents([30, 40, 50, 60]))
    MemoryFileSystem().put(str(tmp_path / "local"), "/shelf-test/data", recursive=True)
    try:
        remote = batch("shelf:///shelf-test/data")
    finally:
        MemoryFileSystem().rm("/shelf-test", recursive=True)
    assert remote.tolist() == batch(tmp_path / "local").tolist()


def test_an_unknown_scheme_is_told_all_that_there_are(distribution: Path) -> None:
    with pytest.raises(UserError, match=r"https://, s3://, gs://, shelf://, missing:// or wrong:// URL"):
        open_storage("ftp://host/data")


def test_a_storage_whose_library_is_missing_says_what_to_install(distribution: Path) -> None:
    with pytest.raises(UserError, match="needs the package no_such_package: pip install missing-storage"):
        open_storage("missing://bucket/data")


def test_an_entry_point_must_be_an_entry(distribution: Path) -> None:
    with pytest.raises(UserError, match=r"'wrong' of nextlat_dist.storages is a str, not a StorageEntry"):
        open_storage("wrong://bucket/data")


def test_ours_need_no_entry_point() -> None:
    assert [entry.scheme for entry in BUILT_IN] == ["http", "https", "s3", "gs"]
    assert storage_entry("https://host/data").is_web
    assert not storage_entry("s3://bucket/data").is_web
