"""Several sources in one stream, prefetching, and what happens to damaged records, through `RowLoader`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.loader import Cursor, Lost, RowLoader, Source
from nextlat_dist.data.packing import RowBatch, batch_digest
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.datasets import FakeTokenizer, write_dataset

ROW = 16
BATCH = 8


def write(path: Path, first: int, documents: int, seed: int = 0) -> Path:
    """Documents of 5 to 40 tokens with ids from `first` on."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 40, documents)
    write_dataset(path, [first + generator.integers(0, 1000, length) for length in lengths], shard_tokens=400)
    return path


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    return [
        Source("web", write(tmp_path / "web", 10_000, 60), 0.5),
        Source("code", write(tmp_path / "code", 20_000, 30), 0.3),
        Source("books", write(tmp_path / "books", 30_000, 10), 0.2),
    ]


def loaders(sources: Sequence[Source] | Path, size: int = 1, **changes: Any) -> list[RowLoader]:
    options: dict[str, Any] = {
        "sequence_length": ROW - 1,
        "packing": "concat",
        "global_batch_size": BATCH,
        "seed": 3,
        "shuffle": True,
        "data_parallel_size": size,
    }
    return [RowLoader(sources, **{**options, **changes}, data_parallel_rank=rank) for rank in range(size)]


def global_batch(batches: Sequence[RowBatch]) -> RowBatch:
    names = ("tokens", "document_ids", "loss_mask")
    return RowBatch(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in names))


def digests(ranks: list[RowLoader], count: int) -> list[str]:
    return [batch_digest([d for each in ranks for d in each.next_batch().row_digests()]) for _ in range(count)]


def test_every_source_gives_its_share_in_its_own_order(sources: list[Source]) -> None:
    (mixed,) = loaders(sources)
    rows = np.concatenate([mixed.next_batch().tokens for _ in range(40)])
    origin = rows[:, 0] // 10_000 - 1
    for row in rows:
        assert len(set((row // 10_000).tolist())) == 1
    for number, source in enumerate(sources):
        counts = np.cumsum(origin == number)
        due = source.weight * (np.arange(len(rows)) + 1)
        assert np.abs(counts - due).max() < 1
        (alone,) = loaders([source], global_batch_size=1)
        mine = rows[origin == number]
        assert len(mine) > 1.2 * alone.rows_per_epoch or source.name != "books", "over the end of an epoch"
        np.testing.assert_array_equal(mine, np.concatenate([alone.next_batch().tokens for _ in mine]))
    assert mixed.epochs()["books"] > 1.2


def test_sources_of_equal_shape_are_not_shuffled_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "one", 10_000, 60)
    first, second = (loaders([Source(name, path)])[0].next_batch().tokens for name in ("a", "b"))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_a_mixture_does_not_depend_on_ranks_workers_or_cuts(sources: list[Source], packing: str) -> None:
    options: dict[str, Any] = {"packing": packing, "weight_changes": [(37, {"web": 0.1, "code": 0.9, "books": 0})]}
    whole = loaders(sources, **options)
    expected = digests(whole, 30)
    assert len(set(expected)) == 30
    for size, workers, cut in ((1, 3, 0), (2, 0, 4), (4, 1, 7), (2, 3, 19)):
        ranks = loaders(sources, 1, **options)
        for each in ranks:
            for _ in range(cut):
                each.next_batch()
        cursor = Cursor.from_json(json.loads(json.dumps(ranks[0].cursor.to_json())))
        assert sum(cursor.taken.values()) == cursor.row == cut * BATCH
        resumed = loaders(sources, size, workers=workers, cursor=cursor, **options)
        assert digests(resumed, 30 - cut) == expected[cut:]
        for each in resumed:
            assert each.cursor == whole[0].cursor
            each.close()


def test_weights_change_at_their_row(sources: list[Source]) -> None:
    (mixed,) = loaders(sources, weight_changes=[(16, {"web": 0, "code": 0, "books": 1})])
    assert mixed.shares == {"web": 0.5, "code": 0.3, "books": 0.2}
    rows = np.concatenate([mixed.next_batch().tokens for _ in range(4)])
    assert mixed.shares == {"web": 0, "code": 0, "books": 1}
    assert set((rows[17:, 0] // 10_000).tolist()) == {3}
    assert set((rows[:16, 0] // 10_000).tolist()) == {1, 2, 3}


def test_sources_must_have_one_tokenizer_and_different_names(sources: list[Source], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two sources have the same name"):
        loaders([*sources, sources[0]])
    write_dataset(tmp_path / "other", [np.arange(50)], tokenizer=FakeTokenizer(sha256="0ther"))
    with pytest.raises(UserError, match=r"source other was made with tokenizer 0ther…, source web with 5ha…"):
        loaders([*sources, Source("other", tmp_path / "other")])


def test_an_error_ahead_is_raised_at_its_batch_and_again(sources: list[Source]) -> None:
    """Workers run into the damage early; the batches before it are still handed out, those after it once repaired."""
    web = sources[0]
    expected = digests(loaders([web]), 20)
    damage(web, [order_of(web)[4]])
    (each,) = loaders([web], workers=2, verify="never")  # of the whole shard, which is found out earlier
    good = sum(
        int(n) for n in Records(open_storage(web.dataset), read_manifest(Path(web.dataset))).tokens[order_of(web)[:4]]
    )
    good = good // (ROW * BATCH)
    assert good >= 1
    assert digests([each], good) == expected[:good]
    for _ in range(2):
        with pytest.raises(UserError, match="is damaged"):
            each.next_batch()
        assert each.cursor.row == good * BATCH
    damage(web, [order_of(web)[4]])  # the same bit again: repaired
    assert digests([each], 20 - good) == expected[good:]
    each.close()


def order_of(source: Source) -> list[int]:
    """Records of the first epoch, in the order of the loader."""
    (each,) = loaders([source], global_batch_size=1)
    stream = each._streams[0]
    return [int(n) for window in range(len(stream._records)) for n in stream._order.records(0, window)]


def damage(source: Source, records: Sequence[int]) -> None:
    """Flip a bit in each of these records."""
    path = Path(source.dataset)
    storage = Records(open_storage(path), read_manifest(path), tolerant=True)
    for record in records:
        with (path / storage._shard(record).name).open("r+b") as file:
            file.seek(int(storage._offset[record]) + 600)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 4]))


QUARANTINE: dict[str, Any] = {"on_damage": "quarantine", "max_quarantined_fraction": 0.5}


@pytest.mark.parametrize("packing", ["concat", "pad"])
@pytest.mark.parametrize("window", [1, 3])
def test_padding_takes_the_place_of_a_damaged_record(sources: list[Source], packing: str, window: int) -> None:
    web = sources[0]
    options = {**QUARANTINE, "packing": packing, "shuffle_window_records": window}
    (before,) = loaders([web], **options)
    count = before.rows_per_epoch // BATCH  # within one epoch
    whole = global_batch([before.next_batch() for _ in range(count)])
    bad = order_of(web)[2]
    storage = Records(open_storage(Path(web.dataset)), read_manifest(Path(web.dataset)))
    gone, documents = storage.read(bad).tokens, int(storage.documents[bad])
    damage(web, [bad])
    (each,) = loaders([web], **options)
    found: list[Lost] = []
    batches = []
    for _ in range(count):
        batches.append(each.next_batch())
        found += each.new_losses
    after = global_batch(batches)
    assert [(loss.source, loss.record) for loss in found] == [("web", bad)]
    assert "is damaged: its crc32" in found[0].reason
    assert each.cursor.quarantined == {"web": [bad]}
    lost = after.document_ids < 0
    assert not after.loss_mask[lost].any()
    if packing == "concat":
        assert lost.sum() == len(gone)
        left = np.concatenate([after.tokens[~lost], gone])
        assert sorted(left.tolist()) == sorted(whole.tokens.ravel().tolist())
    else:
        lost = np.repeat(lost.all(axis=1)[:, None], ROW, axis=1)
        assert lost[:, 0].sum() == documents
    if window == 1:  # nothing else moved
        np.testing.assert_array_equal(after.tokens[~lost], whole.tokens[~lost])
        np.testing.assert_array_equal(after.loss_mask[~lost], whole.loss_mask[~lost])


def test_quarantine_is_the_same_on_any_ranks_workers_and_after_a_cut(sources: list[Source]) -> None:
    for source in sources[:2]:
        damage(source, order_of(source)[3:5])
    expected = digests(loaders(sources, **QUARANTINE), 30)
    for size, workers, cut in ((1, 2, 0), (2, 0, 4), (4, 1, 7)):
        (first,) = loaders(sources, workers=workers, **QUARANTINE)
        assert digests([first], cut) == expected[:cut]
        cursor = Cursor.from_json(json.loads(json.dumps(first.cursor.to_json())))
        first.close()
        ranks = loaders(sources, size, workers=workers, cursor=cursor, **QUARANTINE)
        assert digests(ranks, 30 - cut) == expected[cut:]
        for each in ranks:
            each.close()


def test_a_record_that_was_quarantined_stays_so_when_it_is_mended(sources: list[Source]) -> None:
    """A resume gives what the run would have seen, whatever became of the file since."""
    web = sources[0]
    bad = order_of(web)[1]
    damage(web, [bad])
    (each,) = loaders([web], **QUARANTINE)
    digests([each], 6)
    cursor = each.cursor
    assert cursor.quarantined == {"web": [bad]}
    later = digests([each], 20)
    damage(web, [bad])  # the same bit again: repaired
    assert Records(open_storage(Path(web.dataset)), read_manifest(Path(web.dataset))).read(bad)
    assert digests(loaders([web], cursor=cursor, **QUARANTINE), 20) == later


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loss_found_by_another_rank_counts_here_too(sources: list[Source], workers: int) -> None:
    """What ranks agree on must not depend on who found it: here this rank could read the record well."""
    web = sources[0]
    bad = order_of(web)[0]
    (each,) = loaders([web], workers=workers, **QUARANTINE)
    before = each.next_batch()
    assert (before.document_ids >= 0).all()
    again = each.again([Lost("web", bad, "found by another rank")])
    assert each.cursor == Cursor(BATCH, {"web": BATCH}, {"web": [bad]})
    assert each.new_losses == []
    damage(web, [bad])
    (other,) = loaders([web], **QUARANTINE)
    assert batch_digest(again.row_digests()) == batch_digest(other.next_batch().row_digests())
    assert digests([each], 20) == digests([other], 20)
    each.close()


def test_too_much_damage_stops_the_run(sources: list[Source]) -> None:
    web = sources[0]
    damage(web, order_of(web)[:6])
    (each,) = loaders([web], **{**QUARANTINE, "max_quarantined_fraction": 0.2})
    with pytest.raises(UserError, match=r"records with \d+\.\d+% of the tokens of source web are damaged .*=0\.2;"):
        digests([each], 20)


def test_a_missing_or_cut_shard_can_be_quarantined(sources: list[Source]) -> None:
    web = Path(sources[0].dataset)
    shards = read_manifest(web).shards
    (web / shards[0].name).unlink()
    (web / shards[1].name).write_bytes((web / shards[1].name).read_bytes()[:2048])
    with pytest.raises(UserError, match="is missing"):
        loaders([sources[0]])
    (each,) = loaders([sources[0]], **{**QUARANTINE, "max_quarantined_fraction": 1})
    digests([each], each.rows_per_epoch // BATCH + 1)
    lost = each.cursor.quarantined["web"]
    assert set(range(shards[0].records)) <= set(lost)
    assert set(lost) < set(range(shards[0].records + shards[1].records))
