"""Any dataset, any options, any number of ranks and workers, cut anywhere: one and the same stream."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nextlat_dist.data.loader import Cursor, RowLoader
from nextlat_dist.data.packing import RowBatch, batch_digest
from nextlat_dist.data.shard_format import (
    MANIFEST_FILE,
    ShardEntry,
    index_bytes,
    index_name,
    manifest_bytes,
    read_manifest,
)
from tests.kit import reference_stream
from tests.kit.datasets import FakeTokenizer, numbered_documents, write_dataset

GLOBAL_BATCH_SIZES = (4, 8)  # every data-parallel size divides them
STEPS = 12


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTLAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@dataclass(frozen=True)
class Shape:
    """A dataset: lengths and prompts of its documents, and how they are laid out.

    `empty_shard` is where a shard without any record stands among the others, None for nowhere.
    """

    lengths: tuple[int, ...]
    prompts: tuple[int, ...] | None = None
    record_tokens: int = 32
    shard_tokens: int = 64
    empty_shard: int | None = None

    def write(self, directory: Path) -> None:
        documents = numbered_documents(self.lengths)
        write_dataset(
            directory,
            documents,
            prompts=self.prompts,
            record_tokens=self.record_tokens,
            shard_tokens=self.shard_tokens,
        )
        if self.empty_shard is not None:
            _add_empty_shard(directory, self.empty_shard)

    def records(self) -> list[list[reference_stream.Document]]:
        documents = zip(numbered_documents(self.lengths), self.prompts or [0] * len(self.lengths), strict=True)
        return reference_stream.records_of(
            [reference_stream.Document(tuple(tokens.tolist()), prompt) for tokens, prompt in documents],
            self.record_tokens,
        )


def _add_empty_shard(directory: Path, place: int) -> None:
    name, tar, index = "train-empty.tar", bytes(10240), index_bytes([])
    (directory / name).write_bytes(tar)
    (directory / index_name(name)).write_bytes(index)
    digests = [hashlib.sha256(data).hexdigest() for data in (tar, index)]
    manifest = read_manifest(directory)
    shards = list(manifest.shards)
    shards.insert(place, ShardEntry(name, len(tar), *digests, records=0, documents=0, tokens=0))
    (directory / MANIFEST_FILE).write_bytes(manifest_bytes(dataclasses.replace(manifest, shards=tuple(shards))))


@dataclass(frozen=True)
class Options:
    packing: str
    sequence_length: int
    shuffle: bool = True
    window: int = 1
    seed: int = 7
    global_batch_size: int = 4

    def rules(self) -> reference_stream.Rules:
        return reference_stream.Rules(
            self.seed, self.shuffle, self.window, self.packing, self.sequence_length + 1, FakeTokenizer.pad_id
        )


class Ranks:
    """The loaders of all data-parallel ranks of a run."""

    def __init__(self, dataset: Path, options: Options, *, size: int, workers: int, cursor: Cursor) -> None:
        self._stack = ExitStack()
        self._loaders = [
            self._stack.enter_context(
                closing(
                    RowLoader(
                        dataset,
                        sequence_length=options.sequence_length,
                        packing=options.packing,  # type: ignore[arg-type]
                        global_batch_size=options.global_batch_size,
                        seed=options.seed,
                        shuffle=options.shuffle,
                        shuffle_window_records=options.window,
                        data_parallel_rank=rank,
                        data_parallel_size=size,
                        cursor=cursor,
                        workers=workers,
                    )
                )
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self) -> list[RowBatch]:
        return [loader.next_batch() for loader in self._loaders]

    def digest(self) -> str:
        """SHA-256 of the next global batch."""
        return batch_digest([digest for batch in self.step() for digest in batch.row_digests()])

    def cursor(self) -> Cursor:
        """As it comes back from a checkpoint; the same on every rank."""
        (text,) = {json.dumps(loader.cursor.to_json()) for loader in self._loaders}
        return Cursor.from_json(json.loads(text))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    lengths = draw(
        st.one_of(
            st.lists(st.integers(1, 40), min_size=1, max_size=14),
            st.lists(st.just(1), min_size=1, max_size=20),
            st.lists(st.sampled_from([1, 2, 300]), min_size=1, max_size=6),
        )
    )
    prompts = draw(st.none() | st.tuples(*(st.integers(0, length) for length in lengths)))
    shape = Shape(tuple(lengths), prompts, draw(st.integers(1, 60)), draw(st.integers(1, 200)))
    return dataclasses.replace(shape, empty_shard=draw(st.none() | st.integers(0, 3)))


@st.composite
def datasets_with_options(draw: st.DrawFn) -> tuple[Shape, Options]:
    shape = draw(shapes())
    packing = draw(st.sampled_from(["concat", "pad"]))
    longest = min(24, sum(shape.lengths) - 1) if packing == "concat" else 24
    if longest < 1:  # one token is no row
        packing, longest = "pad", 24
    return shape, Options(
        packing,
        draw(st.integers(1, longest)),
        draw(st.booleans()),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 2**40)),
        draw(st.sampled_from(GLOBAL_BATCH_SIZES)),
    )


ONE_SHARD = Shape((5, 9, 30, 2), shard_tokens=1000)
ONE_DOCUMENT = Shape((1,))
HUGE_DOCUMENT = Shape((3, 400, 1), prompts=(0, 390, 1), empty_shard=0)


@settings(max_examples=60, deadline=None)
@given(datasets_with_options())
@example((ONE_SHARD, Options("concat", 7)))
@example((ONE_DOCUMENT, Options("pad", 3)))
@example((HUGE_DOCUMENT, Options("concat", 16, window=2)))
def test_the_stream_is_what_its_rules_say(case: tuple[Shape, Options]) -> None:
    shape, options = case
    with TemporaryDirectory() as folder:
        shape.write(Path(folder))
        with Ranks(Path(folder), options, size=1, workers=0, cursor=Cursor()) as ranks:
            batches = [batch for _ in range(STEPS) for batch in ranks.step()]
    expected = reference_stream.rows(shape.records(), options.rules(), STEPS * options.global_batch_size)
    for name, dtype in (("tokens", np.int32), ("document_ids", np.int32), ("loss_mask", bool)):
        found = np.concatenate([getattr(batch, name) for batch in batches])
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.array([getattr(row, name) for row in expected]), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(1, 24), st.booleans(), st.integers(1, 5), st.integers(0, 2**40))
def test_an_epoch_holds_every_token_once(
    shape: Shape, sequence_length: int, shuffle: bool, window: int, seed: int
) -> None:
    """Rows know no epochs: the tail of one flows into the next."""
    total = sum(shape.lengths)
    options = Options("concat", min(sequence_length, total - 1), shuffle, window, seed)
    if not options.sequence_length:
        return
    steps = -(-3 * total // (4 * (options.sequence_length + 1)))
    with TemporaryDirectory() as folder:
        shape.write(Path(folder))
        with Ranks(Path(folder), options, size=4, workers=0, cursor=Cursor()) as ranks:
            stream = np.concatenate([batch.tokens.ravel() for _ in range(steps) for batch in ranks.step()])
    for epoch in np.split(stream[: 3 * total], 3):
        assert sorted(epoch.tolist()) == list(range(10, total + 10))


@settings(max_examples=50, deadline=None)
@given(
    datasets_with_options(),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 3]), st.integers(0, 5)), min_size=1, max_size=5
    ),
)
@example((ONE_SHARD, Options("concat", 7)), [(4, 3, 2), (1, 0, 5)])
@example((ONE_DOCUMENT, Options("pad", 3)), [(4, 0, 1), (2, 3, 3)])
@example((HUGE_DOCUMENT, Options("concat", 16, window=2)), [(2, 1, 3), (4, 3, 5)])
def test_ranks_workers_and_cuts_change_no_batch(
    case: tuple[Shape, Options], parts: Sequence[tuple[int, int, int]]
) -> None:
    """A run that is stopped again and again resumes with other ranks and workers each time."""
    shape, options = case
    with TemporaryDirectory() as folder:
        shape.write(Path(folder))
        with Ranks(Path(folder), options, size=1, workers=0, cursor=Cursor()) as uncut:
            expected = [uncut.digest() for _ in range(sum(steps for _, _, steps in parts))]
        found: list[str] = []
        cursor = Cursor()
        for size, workers, steps in parts:
            with Ranks(Path(folder), options, size=size, workers=workers, cursor=cursor) as ranks:
                found += [ranks.digest() for _ in range(steps)]
                cursor = ranks.cursor()
                assert cursor.row == len(found) * options.global_batch_size
    assert found == expected


@pytest.mark.parametrize("packing", ["concat", "pad"])
def test_twenty_cuts_and_every_number_of_ranks_and_workers(tmp_path: Path, packing: str) -> None:
    """Every later global batch of a run that was cut has the SHA-256 of the uncut run's, over several epochs."""
    generator = np.random.default_rng(0)
    lengths = tuple(generator.integers(1, 60, 40).tolist())
    Shape(lengths, tuple(length // 3 for length in lengths), 100, 300).write(tmp_path)
    options = Options(packing, 24, window=2, global_batch_size=8)
    steps = 24
    with Ranks(tmp_path, options, size=1, workers=0, cursor=Cursor()) as uncut:
        expected, cursors = [], [uncut.cursor()]
        for _ in range(steps):
            expected.append(uncut.digest())
            cursors.append(uncut.cursor())
    assert len(set(expected)) == steps
    rows_of_an_epoch = sum(lengths) // 25 if packing == "concat" else len(lengths)
    assert steps * 8 > 3 * rows_of_an_epoch
    for cut in generator.choice(steps, 20, replace=False).tolist():
        for size in (1, 2, 4):
            for workers in (0, 1, 3):
                with Ranks(tmp_path, options, size=size, workers=workers, cursor=cursors[cut]) as ranks:
                    found = [ranks.digest() for _ in range(cut, steps)]
                assert found == expected[cut:], f"cut at {cut}, {size} ranks, {workers} workers"
