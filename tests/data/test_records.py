from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from nextlat_dist.data.members import split_members
from nextlat_dist.data.records import DamagedRecord, Records
from nextlat_dist.data.shard_format import Manifest, Record, ShardEntry, TokenizerEntry, read_manifest
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, write_dataset

LENGTHS = [20, 50, 3, 100, 1, 40, 70, 70]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path, numbered_documents(LENGTHS), prompts=[1] * len(LENGTHS), shard_tokens=200)
    return tmp_path


def storage(dataset: Path) -> Records:
    return Records(open_storage(dataset), read_manifest(dataset))


def test_records_come_back_in_the_order_they_were_written(dataset: Path) -> None:
    opened = storage(dataset)
    records = [opened.read(number) for number in range(len(opened))]
    np.testing.assert_array_equal(np.concatenate([r.tokens for r in records]), np.arange(sum(LENGTHS)) + 10)
    assert np.concatenate([r.lengths for r in records]).tolist() == LENGTHS
    assert opened.tokens.tolist() == [len(r.tokens) for r in records]
    assert opened.documents.tolist() == [len(r.ends) for r in records]


def test_plain_webdataset_reads_the_same_arrays(dataset: Path) -> None:
    import webdataset

    opened = storage(dataset)
    shards = [str(path) for path in sorted(dataset.glob("*.tar"))]
    assert len(shards) > 1
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(samples) == len(opened)
    assert len({sample["__key__"] for sample in samples}) == len(opened)
    for number, sample in enumerate(samples):
        record = opened.read(number)
        for member, array in (("tokens", record.tokens), ("ends", record.ends), ("prompts", record.prompts)):
            assert sample[f"{member}.npy"].dtype == array.dtype
            np.testing.assert_array_equal(sample[f"{member}.npy"], array)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["000.txt", "folder/000.txt", "f" * 80 + "/" + "g" * 70 + ".txt", "über/straße.txt"])
def test_members_of_any_tar_are_those_that_webdataset_sees(kind: int, name: str) -> None:
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for extension, content in (("txt", b"a text"), ("cls", b""), ("npy", bytes(range(256)) * 5)):
            member = tarfile.TarInfo(name.replace("txt", extension))
            member.size = len(content)
            member.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]
            tar.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()
    expected = {base_plus_ext(m["fname"])[1]: m["data"] for m in tar_file_iterator(io.BytesIO(data))}
    assert split_members(data) == expected
    assert len(expected) == 3


def test_every_flipped_bit_is_noticed_with_its_place(dataset: Path) -> None:
    """Any bit inside any record: headers, padding and payload alike."""
    opened = Records(open_storage(dataset), read_manifest(dataset), verify="never")  # of whole shards
    shard = sorted(dataset.glob("*.tar"))[0]
    good = shard.read_bytes()
    records = [n for n in range(len(opened)) if opened.describe(n).endswith(shard.name)]
    end = sum(int(opened._length[n]) for n in records)
    generator = np.random.default_rng(0)
    for bit in generator.integers(0, 8 * end, 300):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(bad)
        (hit,) = [n for n in records if opened._offset[n] <= bit // 8 < opened._offset[n] + opened._length[n]]
        for number in records:
            if number == hit:
                offset = opened._offset[number]
                with pytest.raises(UserError, match=rf"record \d+ at offset {offset} of shard .*damaged"):
                    opened.read(number)
            else:
                assert isinstance(opened.read(number), Record)


def test_a_shard_that_is_cut_short_is_refused(dataset: Path) -> None:
    opened = storage(dataset)
    shard = sorted(dataset.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:1024])
    with pytest.raises(UserError, match="has 1024 bytes where the manifest says"):
        storage(dataset)
    with pytest.raises(UserError, match="damaged"):  # cut while a run has it open
        opened.read(0)


def test_a_missing_shard_is_refused(dataset: Path) -> None:
    opened = storage(dataset)
    sorted(dataset.glob("*.tar"))[0].unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar is missing"):
        storage(dataset)
    with pytest.raises(UserError, match=r"cannot be read"):
        opened.read(0)


def test_counts_of_the_index_must_hold(dataset: Path) -> None:
    opened = storage(dataset)
    opened.tokens[0] += 1
    with pytest.raises(UserError, match="does not hold the tokens and documents"):
        opened.read(0)


def test_a_dataset_without_shards_opens_empty(tmp_path: Path) -> None:
    empty: Manifest = write_dataset(tmp_path, [])
    assert len(Records(open_storage(tmp_path), empty)) == 0


def test_what_may_pass_is_no_damage(dataset: Path) -> None:
    """A network that is down must not be quarantined record by record."""
    opened = storage(dataset)
    shard = sorted(dataset.glob("*.tar"))[0]
    shard.unlink()
    shard.mkdir()  # reading it is an error other than "not found"
    with pytest.raises(UserError, match=r"cannot be read .*repair the access") as caught:
        opened.read(0)
    assert not isinstance(caught.value, DamagedRecord)
    shard.rmdir()
    with pytest.raises(DamagedRecord, match=r"cannot be read .*copy the shard again"):
        storage_without_check(dataset).read(0)


def test_a_server_that_is_down_is_one_sentence() -> None:
    class Down:
        url = "http://server/data"

        def sizes(self, names: list[str]) -> list[int | None]:
            raise ConnectionError("timed out, tried 5 times")

    manifest = dataclasses.replace(EMPTY, shards=(ShardEntry("a.tar", 1, "", "", 0, 0, 0),))
    with pytest.raises(UserError, match=r"the shards of http://server/data cannot be looked up .*tried 5 times"):
        Records(cast(Storage, Down()), manifest)


def storage_without_check(dataset: Path) -> Records:
    return Records(open_storage(dataset), read_manifest(dataset), verify="never", tolerant=True)


EMPTY = Manifest("train", TokenizerEntry("tokenizer.model", "", 10, 1, 2, 3), (), False, True, True, {})
