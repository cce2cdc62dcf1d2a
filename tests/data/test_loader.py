from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextlat_dist.data.loader import Cursor, RowBatch, RowLoader
from nextlat_dist.data.order import permutation
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import manifest_bytes, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.datasets import FakeTokenizer, numbered_documents, write_dataset
from tests.kit.no_torch import BLOCK_TORCH

LENGTHS = [20, 50, 3, 100, 1, 40, 70, 70, 9, 9, 9, 33, 2, 64]
PROMPTS = [2, 50, 0, 30, 1, 1, 1, 69, 3, 3, 3, 10, 2, 64]


def loader(dataset: Path, **changes: Any) -> RowLoader:
    options: dict[str, Any] = {
        "sequence_length": 16,
        "packing": "concat",
        "global_batch_size": 4,
        "seed": 7,
        "shuffle": True,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
    }
    return RowLoader(dataset, **{**options, **changes})


def row_hashes(batches: list[RowBatch]) -> list[str]:
    """A hash of each row of these batches, in order."""
    rows: list[str] = []
    for batch in batches:
        for row in zip(batch.tokens, batch.document_ids, batch.loss_mask, strict=True):
            rows.append(hashlib.sha256(b"".join(array.tobytes() for array in row)).hexdigest())
    return rows


def global_batch(loaders: list[RowLoader]) -> list[str]:
    return row_hashes([each.next_batch() for each in loaders])


@pytest.fixture(params=[False, True], ids=["plain", "prompts"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_dataset(tmp_path, numbered_documents(LENGTHS), prompts=PROMPTS if request.param else None, shard_tokens=150)
    return tmp_path


def stream(dataset: Path, seed: int, shuffle: bool) -> Iterator[list[tuple[int, int]]]:
    """Documents of the endless stream as (token, whether it is a target), walked one by one: the slow oracle."""
    storage = Records(open_storage(dataset), read_manifest(dataset))
    epoch = 0
    while True:
        count = len(storage)
        for number in permutation(count, seed, epoch, 0) if shuffle else range(count):
            record = storage.read(int(number))
            pieces = np.split(record.tokens, record.ends[:-1])
            for document in permutation(len(pieces), seed, epoch, 1, int(number)) if shuffle else range(len(pieces)):
                prompt = 0 if record.prompts is None else int(record.prompts[document])
                yield [(int(token), int(index >= max(prompt, 1))) for index, token in enumerate(pieces[document])]
        epoch += 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_concat_equals_walking_the_stream_token_by_token(dataset: Path, shuffle: bool) -> None:
    tokens, masks, documents = [], [], []
    for number, document in enumerate(islice(stream(dataset, 7, shuffle), 5 * len(LENGTHS))):
        for token, target in document:
            tokens.append(token)
            masks.append(bool(target))
            documents.append(number)
    each = loader(dataset, shuffle=shuffle)
    batches = [each.next_batch() for _ in range(25)]  # 1700 tokens: more than three epochs
    taken = 25 * 4 * 17
    assert np.concatenate([b.tokens.ravel() for b in batches]).tolist() == tokens[:taken]
    assert np.concatenate([b.loss_mask.ravel() for b in batches]).tolist() == masks[:taken]
    rows = np.array(documents[:taken]).reshape(-1, 17)
    expected = rows - rows[:, :1]
    np.testing.assert_array_equal(np.concatenate([b.document_ids for b in batches]), expected)


def test_pad_equals_walking_the_stream_document_by_document(dataset: Path) -> None:
    each = loader(dataset, packing="pad", sequence_length=39)
    batches = [each.next_batch() for _ in range(10)]
    walked = list(islice(stream(dataset, 7, True), 40))
    for row, document in enumerate(walked):
        batch, at = batches[row // 4], row % 4
        kept = document[:40]
        padding = 40 - len(kept)
        assert batch.tokens[at].tolist() == [token for token, _ in kept] + [3] * padding
        assert batch.document_ids[at].tolist() == [0] * len(kept) + [-1] * padding
        assert batch.loss_mask[at].tolist() == [bool(target) for _, target in kept] + [False] * padding
    assert each.truncated_documents == sum(len(document) > 40 for document in walked)


def test_concat_shows_every_token_of_an_epoch_once_and_flows_into_the_next(dataset: Path) -> None:
    total = sum(LENGTHS)
    each = loader(dataset, global_batch_size=1)
    assert total % 17, "the epoch must end inside a row for this test to mean anything"
    assert each.rows_per_epoch == total // 17
    seen = np.concatenate([each.next_batch().tokens.ravel() for _ in range(2 * total // 17 + 1)])
    for epoch in range(2):
        assert Counter(seen[epoch * total : (epoch + 1) * total].tolist()) == Counter(range(10, total + 10))
    assert seen[:total].tolist() != seen[total : 2 * total].tolist()


def test_pad_shows_every_document_of_an_epoch_once(dataset: Path) -> None:
    each = loader(dataset, packing="pad", sequence_length=120, global_batch_size=1)
    assert each.rows_per_epoch == len(LENGTHS)
    first_tokens = [int(each.next_batch().tokens[0, 0]) for _ in LENGTHS]
    assert sorted(first_tokens) == [int(document[0]) for document in numbered_documents(LENGTHS)]
    assert each.truncated_documents == 0


@pytest.mark.parametrize("packing", ["concat", "pad"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_do_not_depend_on_ranks_or_on_where_the_run_was_cut(dataset: Path, packing: str, size: int) -> None:
    uncut = loader(dataset, packing=packing)
    expected = [global_batch([uncut]) for _ in range(30)]
    for cut in (0, 1, 7, 13, 29):
        ranks = [
            loader(
                dataset,
                packing=packing,
                data_parallel_rank=rank,
                data_parallel_size=size,
                cursor=Cursor.from_json(json.loads(json.dumps(Cursor(4 * cut).to_json()))),
            )
            for rank in range(size)
        ]
        for number in range(cut, 30):
            assert global_batch(ranks) == expected[number]
        assert {each.cursor.row for each in ranks} == {4 * 30}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    record_tokens=st.integers(1, 60),
    shard_tokens=st.integers(1, 120),
    sequence_length=st.integers(1, 12),
    size=st.sampled_from([1, 2, 4]),
    cut=st.integers(0, 9),
    packing=st.sampled_from(["concat", "pad"]),
)
def test_any_shape_of_dataset_gives_the_stream(
    lengths: list[int], record_tokens: int, shard_tokens: int, sequence_length: int, size: int, cut: int, packing: str
) -> None:
    """One record per document, one document for four ranks, one huge document: the walk is the judge."""
    row = sequence_length + 1
    if packing == "concat" and sum(lengths) < row:
        return
    with TemporaryDirectory() as folder:
        path = Path(folder)
        write_dataset(path, numbered_documents(lengths), record_tokens=record_tokens, shard_tokens=shard_tokens)
        ranks = [
            loader(
                path,
                packing=packing,
                sequence_length=sequence_length,
                data_parallel_rank=rank,
                data_parallel_size=size,
                cursor=Cursor(4 * cut),
            )
            for rank in range(size)
        ]
        tokens = np.concatenate([each.next_batch().tokens for each in ranks])
        first = 4 * cut
        if packing == "concat":
            walked = (token for document in stream(path, 7, True) for token, _ in document)
            expected = list(islice(walked, first * row, (first + 4) * row))
            assert tokens.ravel().tolist() == expected
        else:
            documents = islice(stream(path, 7, True), first, first + 4)
            assert [t[t != 3].tolist() for t in tokens] == [[token for token, _ in d][:row] for d in documents]


def test_a_rank_reads_only_the_records_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, numbered_documents([64] * 64), record_tokens=64)
    read: list[int] = []
    original = Records.read
    monkeypatch.setattr(Records, "read", lambda self, record: read.append(record) or original(self, record))
    each = loader(
        tmp_path, sequence_length=31, global_batch_size=8, data_parallel_rank=1, data_parallel_size=2, cursor=Cursor(80)
    )
    each.next_batch()
    assert len(read) == 2, "four rows of 32 tokens lie in two records of 64"
    each.next_batch()
    assert len(set(read)) == 4


def test_small_rows_read_each_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, numbered_documents([64] * 8), record_tokens=64)
    read: list[int] = []
    original = Records.read
    monkeypatch.setattr(Records, "read", lambda self, record: read.append(record) or original(self, record))
    each = loader(tmp_path, sequence_length=7, global_batch_size=1)
    for _ in range(64):
        each.next_batch()
    assert sorted(read) == list(range(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"packing": "best-fit"}, "packing is 'best-fit'"),
        ({"global_batch_size": 3, "data_parallel_size": 2}, "global_batch_size 3 is not divisible by .* 2"),
        ({"vocab_size": 59999}, "has 60000 ids, but the model's vocab_size is 59999"),
        ({"tokenizer_sha256": "other"}, "was made with tokenizer 5ha…, not with other"),
        ({"sequence_length": sum(LENGTHS)}, "too few for one row"),
    ],
)
def test_what_cannot_work_is_refused_at_once(dataset: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader(dataset, **changes)


def test_the_limits_themselves_are_accepted(dataset: Path) -> None:
    each = loader(dataset, vocab_size=60000, tokenizer_sha256="5ha", sequence_length=sum(LENGTHS) - 1)
    assert each.rows_per_epoch == 1
    assert each.next_batch().tokens.shape == (4, sum(LENGTHS))
    assert each.manifests["train"].tokens == sum(LENGTHS)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, [])
    for packing in ("concat", "pad"):
        with pytest.raises(UserError, match="has 0 tokens in 0 documents"):
            loader(tmp_path, packing=packing)


def test_a_token_outside_the_vocabulary_is_refused_with_its_place(tmp_path: Path) -> None:
    tokenizer = FakeTokenizer()
    documents = numbered_documents([100, 100])
    documents[1][50] = 5000
    write_dataset(tmp_path, documents, record_tokens=100, tokenizer=tokenizer)
    # The tokenizer's claim is smaller than what is stored: only reading can tell.
    manifest = read_manifest(tmp_path)
    small = dataclasses.replace(manifest, tokenizer=dataclasses.replace(manifest.tokenizer, vocab_size=300))
    (tmp_path / "manifest.json").write_bytes(manifest_bytes(small))
    each = loader(tmp_path, sequence_length=99, global_batch_size=1, shuffle=False, vocab_size=5001)
    each.next_batch()
    each.next_batch()
    each = loader(tmp_path, sequence_length=99, global_batch_size=1, shuffle=False, vocab_size=5000)
    each.next_batch()
    before = each.cursor
    with pytest.raises(UserError, match=r"record 1 at offset 2048 of shard .*train-000000\.tar holds token id 5000"):
        each.next_batch()
    assert each.cursor == before


def test_importing_the_loader_and_the_commands_does_not_import_torch() -> None:
    code = "import sys, nextlat_dist.data.loader, data_tools.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reading_works_where_torch_is_not_installed(dataset: Path) -> None:
    code = BLOCK_TORCH + (
        "from pathlib import Path\nfrom nextlat_dist.data.loader import RowLoader\n"
        f"loader = RowLoader(Path({str(dataset)!r}), sequence_length=16, packing='concat', global_batch_size=4,\n"
        "    seed=7, shuffle=True, data_parallel_rank=0, data_parallel_size=1)\n"
        "print(loader.next_batch().tokens.sum())\nassert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(result.stdout) == loader(dataset).next_batch().tokens.sum()
