"""Damage anywhere in a dataset is an error or, where that was asked for, a known loss: never a shorter epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

from data_tools.tars.index import find_tars, index
from nextlat_dist.data.loader import Cursor, RowLoader
from nextlat_dist.data.packing import batch_digest
from nextlat_dist.data.records import DamagedRecord, Records
from nextlat_dist.data.shard_format import MANIFEST_FILE, MembersEntry, Record, index_name, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, tiny_tokenizer, write_dataset

LENGTHS = [20, 50, 3, 100, 1, 40, 70, 70, 9, 9, 9, 33, 2, 64, 100, 30, 30, 30, 30, 30]
BLOCK = 512
SHARD = 1  # the one that is damaged: records before and after it must come through


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXTLAT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    directory = tmp_path / "dataset"
    manifest = write_dataset(
        directory, numbered_documents(LENGTHS), prompts=[1] * len(LENGTHS), record_tokens=40, shard_tokens=250
    )
    assert len(manifest.shards) == 3
    return directory


class Damaged:
    """A dataset and one shard of it, which is damaged in place.

    Attributes:
        records: what every record held when all was well.
        own: numbers of the shard's records, with their byte ranges.
    """

    def __init__(self, dataset: Path) -> None:
        self.dataset = dataset
        manifest = read_manifest(dataset)
        self.path = dataset / manifest.shards[SHARD].name
        self.good = self.path.read_bytes()
        self.records = [record for _, record in read_all(open_records(dataset))]
        assert all(isinstance(record, Record) for record in self.records)
        table = np.load(dataset / index_name(self.path.name))
        first = sum(shard.records for shard in manifest.shards[:SHARD])
        self.own = {first + n: (int(row[0]), int(row[0] + row[1])) for n, row in enumerate(table)}

    def hit(self, begin: int, end: int) -> set[int]:
        """Records with a byte in this range of the shard."""
        return {number for number, (first, last) in self.own.items() if first < end and last > begin}

    def check(self, storage: Records, lost: Iterable[int]) -> None:
        """Exactly the `lost` records are errors; all others are there, unchanged."""
        found = read_all(storage)
        assert [number for number, _ in found] == list(range(len(self.records)))
        assert {number for number, record in found if isinstance(record, UserError)} == set(lost)
        for number, record in found:
            if isinstance(record, Record):
                assert_same(record, self.records[number])


def open_records(dataset: Path, **options: Any) -> Records:
    return Records(open_storage(dataset), read_manifest(dataset), **options)


def read_all(storage: Records) -> list[tuple[int, Record | UserError]]:
    """Every record, or the error it gave; anything but a UserError ends the test."""
    found: list[tuple[int, Record | UserError]] = []
    for number in range(len(storage)):
        try:
            found.append((number, storage.read(number)))
        except UserError as error:
            found.append((number, error))
    return found


def assert_same(record: Record, expected: Record) -> None:
    for name in ("tokens", "ends", "prompts"):
        np.testing.assert_array_equal(getattr(record, name), getattr(expected, name))


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << (bit % 8)
    return bytes(flipped)


def test_a_flipped_bit_anywhere_in_a_shard_is_detected(dataset: Path) -> None:
    """A thousand of them: tar headers, payloads, padding, and the end blocks, which belong to no record.

    The sha256 refuses the whole shard, also after it was found right once. The crc32 alone costs the record that is
    hit, and no other.
    """
    damaged = Damaged(dataset)
    open_before = open_records(dataset, verify="never")
    hits = {"header": 0, "payload": 0, "outside": 0}
    for bit in np.random.default_rng(0).integers(0, 8 * len(damaged.good), 1000).tolist():
        damaged.path.write_bytes(flip(damaged.good, bit))
        damaged.check(open_records(dataset), damaged.own)
        lost = damaged.hit(bit // 8, bit // 8 + 1)
        damaged.check(open_before, lost)
        for number in lost:
            with pytest.raises(DamagedRecord, match=rf"offset {damaged.own[number][0]} of shard .*damaged"):
                open_before.read(number)
        in_header = damaged.good[bit // 8 // BLOCK * BLOCK :][257:262] == b"ustar"
        hits["outside" if not lost else "header" if in_header else "payload"] += 1
    assert min(hits.values()) > 50, hits
    damaged.path.write_bytes(damaged.good)
    damaged.check(open_records(dataset), ())


def test_always_reads_a_shard_that_is_known_to_be_right(dataset: Path) -> None:
    """Its stamp is what the damage left alone."""
    damaged = Damaged(dataset)
    before = damaged.path.stat()
    damaged.path.write_bytes(flip(damaged.good, 8 * (len(damaged.good) - 1)))
    os.utime(damaged.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    damaged.check(open_records(dataset, verify="first"), ())
    damaged.check(open_records(dataset, verify="always"), damaged.own)


def test_a_bit_that_rots_under_an_old_time_of_change_is_detected_by_its_record(dataset: Path) -> None:
    """The shard is trusted by its stamp, so the crc32 is all there is."""
    damaged = Damaged(dataset)
    before = damaged.path.stat()
    for number, (begin, end) in damaged.own.items():
        damaged.path.write_bytes(flip(damaged.good, 8 * ((begin + end) // 2)))
        os.utime(damaged.path, ns=(before.st_atime_ns, before.st_mtime_ns))
        damaged.check(open_records(dataset, verify="first"), [number])


def test_a_shard_cut_at_any_block_is_detected(dataset: Path) -> None:
    damaged = Damaged(dataset)
    cuts = range(0, len(damaged.good), BLOCK)
    assert len(cuts) == 40
    already_open = open_records(dataset, verify="never")
    for cut in cuts:
        lost = damaged.hit(cut, len(damaged.good))
        damaged.path.write_bytes(damaged.good[:cut])
        with pytest.raises(UserError, match=f"has {cut} bytes where the manifest says {len(damaged.good)}"):
            open_records(dataset)
        damaged.check(already_open, lost)
        damaged.check(open_records(dataset, tolerant=True), lost)
        # A copy that was stopped may leave a hole of zeros up to the full size.
        damaged.path.write_bytes(damaged.good[:cut].ljust(len(damaged.good), b"\0"))
        damaged.check(open_records(dataset, verify="never"), lost)
        if damaged.good[cut:].strip(b"\0"):
            damaged.check(open_records(dataset), damaged.own)


def test_a_shard_that_grew_is_detected(dataset: Path) -> None:
    damaged = Damaged(dataset)
    damaged.path.write_bytes(damaged.good + bytes(BLOCK))
    with pytest.raises(UserError, match=f"has {len(damaged.good) + BLOCK} bytes where the manifest says"):
        open_records(dataset)


def test_swapped_shards_are_detected(dataset: Path) -> None:
    """Both are sound tars with sound records, in the wrong place."""
    other, damaged = dataset / read_manifest(dataset).shards[0].name, Damaged(dataset)
    damaged.path.write_bytes(other.read_bytes().ljust(len(damaged.good), b"\0")[: len(damaged.good)])
    damaged.check(open_records(dataset), damaged.own)


def test_any_damage_to_an_index_is_detected(dataset: Path) -> None:
    path = dataset / index_name(read_manifest(dataset).shards[SHARD].name)
    good = path.read_bytes()
    bits = np.random.default_rng(2).integers(0, 8 * len(good), 500).tolist()
    for bad in [*(flip(good, bit) for bit in bits), *(good[:cut] for cut in range(len(good))), good + b"\0"]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"index {path} does not match"):
            open_records(dataset)
    path.unlink()
    with pytest.raises(UserError, match=f"index {path} .* is missing"):
        open_records(dataset)


def test_any_damage_to_a_manifest_is_detected(dataset: Path) -> None:
    """One bit of each byte, and a cut after every byte but the last, which is a line end."""
    path = dataset / MANIFEST_FILE
    good = path.read_bytes()
    storage = open_storage(dataset)
    bits = (8 * np.arange(len(good)) + np.random.default_rng(4).integers(0, 8, len(good))).tolist()
    for bad in [*(flip(good, bit) for bit in bits), *(good[:cut] for cut in range(len(good) - 1))]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=str(path)):
            read_manifest(storage)


@pytest.fixture
def text_dataset(tmp_path: Path) -> Path:
    """Documents of text, which are tokenised whenever they are read, as `nextlat-data index` adopts them."""
    directory = tmp_path / "text"
    directory.mkdir()
    with TarWriter(str(directory / "train-000000.tar")) as tar:
        for number in range(8):
            tar.write({"__key__": f"{number:03d}", "txt": f"document {number} of some words, 1234 in all\n" * 3})
    members = MembersEntry("text", "txt")
    index(find_tars([str(directory)], None), Tokenizer(tiny_tokenizer()), members, split="train", bos=True, eos=True)
    return directory


def test_any_damage_to_a_tokenizer_that_reading_needs_is_detected(text_dataset: Path) -> None:
    """Most flipped bits leave a model that loads, and gives other tokens."""
    assert all(isinstance(record, Record) for _, record in read_all(open_records(text_dataset)))
    path = text_dataset / read_manifest(text_dataset).tokenizer.file
    good = path.read_bytes()
    for bit in np.random.default_rng(3).integers(0, 8 * len(good), 200).tolist():
        path.write_bytes(flip(good, bit))
        with pytest.raises(UserError, match=str(path)):
            open_records(text_dataset)
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        open_records(text_dataset)


GLOBAL_BATCH = 4
STEPS = 24  # of 4 rows of 17 tokens: two epochs


class Run:
    """A run of one rank or several that tolerates damage; the ranks tell each other what they lost."""

    def __init__(self, dataset: Path, size: int, workers: int, cursor: Cursor, packing: str) -> None:
        self.ranks = [
            RowLoader(
                dataset,
                sequence_length=16,
                packing=packing,  # type: ignore[arg-type]
                global_batch_size=GLOBAL_BATCH,
                seed=5,
                shuffle=True,
                shuffle_window_records=2,
                data_parallel_rank=rank,
                data_parallel_size=size,
                cursor=cursor,
                workers=workers,
                on_damage="quarantine",
                max_quarantined_fraction=1.0,
            )
            for rank in range(size)
        ]

    def step(self) -> str:
        """Digest of the next global batch."""
        batches = [rank.next_batch() for rank in self.ranks]
        losses = [loss for rank in self.ranks for loss in rank.new_losses]
        if losses:
            batches = [rank.again(losses) for rank in self.ranks]
        return batch_digest([digest for batch in batches for digest in batch.row_digests()])

    def cursor(self) -> Cursor:
        """Through JSON, as a checkpoint keeps it; all ranks must agree on it."""
        (text,) = {json.dumps(rank.cursor.to_json()) for rank in self.ranks}
        return Cursor.from_json(json.loads(text))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def damage_records(damaged: Damaged, numbers: Iterable[int]) -> None:
    data = damaged.good
    for number in numbers:
        begin, end = damaged.own[number]
        data = flip(data, 8 * ((begin + end) // 2))
    damaged.path.write_bytes(data)


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_quarantine_goes_on_the_same_on_any_number_of_ranks_and_after_any_cut(dataset: Path, packing: str) -> None:
    damaged = Damaged(dataset)
    lost = sorted(damaged.own)[1:3]
    damage_records(damaged, lost)
    uncut = Run(dataset, 1, 0, Cursor(), packing)
    expected, cursors = [], [uncut.cursor()]
    for _ in range(STEPS):
        expected.append(uncut.step())
        cursors.append(uncut.cursor())
    assert cursors[-1].quarantined == {"train": lost}
    assert cursors[0].quarantined == {}
    for size, workers, cut in ((1, 3, 0), (2, 0, 0), (2, 1, 5), (4, 3, 0), (4, 0, 0), (4, 1, STEPS - 1)):
        run = Run(dataset, size, workers, cursors[cut], packing)
        for step in range(cut, STEPS):
            assert run.step() == expected[step], f"batch {step} of {size} ranks, {workers} workers, cut at {cut}"
            assert run.cursor() == cursors[step + 1]
        run.close()


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_what_was_quarantined_stays_so_when_the_shard_is_repaired(dataset: Path, packing: str) -> None:
    damaged = Damaged(dataset)
    damage_records(damaged, [sorted(damaged.own)[2]])
    uncut = Run(dataset, 1, 0, Cursor(), packing)
    for _ in range(STEPS // 2):
        uncut.step()
    cursor = uncut.cursor()
    assert cursor.quarantined["train"]
    expected = [uncut.step() for _ in range(STEPS // 2)]
    damaged.path.write_bytes(damaged.good)
    resumed = Run(dataset, 2, 1, cursor, packing)
    assert [resumed.step() for _ in range(STEPS // 2)] == expected
    forgetful = Run(dataset, 1, 0, Cursor(cursor.row, cursor.taken), packing)
    assert [forgetful.step() for _ in range(STEPS // 2)] != expected
    resumed.close()


def test_quarantine_loses_the_damaged_records_and_nothing_else(dataset: Path) -> None:
    """An epoch in one row: what is there, what is padding, and what is a target."""
    damaged = Damaged(dataset)
    lost = sorted(damaged.own)[1:3]
    damage_records(damaged, lost)
    loader = RowLoader(
        dataset,
        sequence_length=sum(LENGTHS) - 1,
        packing="concat",
        global_batch_size=1,
        seed=5,
        shuffle=True,
        shuffle_window_records=3,
        data_parallel_rank=0,
        data_parallel_size=1,
        on_damage="quarantine",
        max_quarantined_fraction=1.0,
    )
    batch = loader.next_batch()
    assert {(loss.source, loss.record) for loss in loader.new_losses} == {("train", number) for number in lost}
    assert all("damaged" in loss.reason and damaged.path.name in loss.reason for loss in loader.new_losses)
    gone = np.concatenate([damaged.records[number].tokens for number in lost])
    padding = batch.document_ids == -1
    assert padding.sum() == len(gone)
    kept = np.setdiff1d(np.arange(sum(LENGTHS)) + 10, gone)
    assert sorted(batch.tokens[~padding].tolist()) == kept.tolist()
    assert set(batch.tokens[padding].tolist()) == {3}
    assert not batch.loss_mask[padding].any()
    loader.next_batch()
    assert loader.new_losses == [], "a loss is news once"


def test_quarantine_has_a_limit(dataset: Path) -> None:
    damaged = Damaged(dataset)
    damage_records(damaged, damaged.own)
    loader = RowLoader(
        dataset,
        sequence_length=16,
        packing="concat",
        global_batch_size=4,
        seed=5,
        shuffle=False,
        data_parallel_rank=0,
        data_parallel_size=1,
        on_damage="quarantine",
        max_quarantined_fraction=0.05,
    )
    loader.next_batch()  # of the first shard, which is sound
    with pytest.raises(UserError, match=r"max_quarantined_fraction=0\.05"):
        _ = [loader.next_batch() for _ in range(STEPS)]
