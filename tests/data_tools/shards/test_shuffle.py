"""`shard` mixes documents: a batch sees many folders, and the bytes are a function of input and seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.shards import encode, shuffle
from data_tools.shards.shard import ShardOptions, shard
from data_tools.text.find import find_files
from data_tools.text.sources import FileSource, TextSource
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.stream import RowStream
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from tests.kit.datasets import tiny_tokenizer

FOLDERS, FILES = 10, 60
ROW_TOKENS, ROWS = 33, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten folders whose texts are of one letter each."""
    root = tmp_path_factory.mktemp("folders")
    for folder in range(FOLDERS):
        (root / f"{folder}").mkdir()
        for number in range(FILES):
            (root / f"{folder}/{number:02d}.txt").write_text(f"{chr(97 + folder)} {number} " * 8)
    return root


def options(output: Path, seed: int | None, **changes: object) -> ShardOptions:
    sizes = {"record_tokens": 1000, "shard_tokens": 12_000, **changes}
    return ShardOptions(tiny_tokenizer(), output, shuffle_seed=seed, **sizes)  # type: ignore[arg-type]


def run(corpus: Path, output: Path, seed: int | None, **changes: object) -> dict[str, bytes]:
    shard(FileSource(find_files([str(corpus)])), options(output, seed, **changes))
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def texts(dataset: Path) -> list[str]:
    manifest = read_manifest(dataset)
    records, tokenizer = Records(open_storage(dataset), manifest), Tokenizer(tiny_tokenizer())
    found = []
    for number in range(len(records)):
        record = records.read(number)
        found += [tokenizer.decode(part) for part in np.split(record.tokens, record.ends[:-1])]
    return found


def folders_per_batch(dataset: Path) -> float:
    """Mean number of folders in a batch of 16 rows, over an epoch, in the order of training."""
    manifest = read_manifest(dataset)
    stream = RowStream(
        Records(open_storage(dataset), manifest),
        manifest,
        row_tokens=ROW_TOKENS,
        packing="concat",
        seed=0,
        shuffle=True,
        window_records=1,
        vocab_size=manifest.tokenizer.vocab_size,
    )
    letter = {Tokenizer(tiny_tokenizer()).encode(chr(97 + folder))[0]: folder for folder in range(FOLDERS)}
    seen = []
    for begin in range(0, stream.rows_per_epoch - ROWS, ROWS):
        tokens = np.asarray(stream.rows(begin, begin + ROWS).batch.tokens)
        seen.append(len({letter[token] for token in np.unique(tokens).tolist() if token in letter}))
    return float(np.mean(seen))


def test_a_batch_sees_most_folders(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "mixed", 0)
    run(corpus, tmp_path / "as_found", None)
    assert sorted(texts(tmp_path / "mixed")) == sorted(texts(tmp_path / "as_found"))
    before, after = folders_per_batch(tmp_path / "as_found"), folders_per_batch(tmp_path / "mixed")
    assert before < 2.5, before
    assert after > 6, after


def test_the_bytes_are_a_function_of_the_seed_alone(corpus: Path, tmp_path: Path) -> None:
    first = run(corpus, tmp_path / "a", 0)
    assert run(corpus, tmp_path / "b", 0, workers=2) == first
    assert run(corpus, tmp_path / "c", 1) != first
    assert len([name for name in first if name.endswith(".tar")]) > 1


def test_a_buffer_is_bounded_and_a_shard_has_several(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tokens and, since a short document takes more memory than its tokens, in documents."""
    monkeypatch.setattr(shuffle, "BUFFER_TOKENS", 3000)
    held: list[tuple[int, int]] = []
    add = shuffle.ShuffledWriter.add

    def counted(self: shuffle.ShuffledWriter, *document: object) -> bool:
        finished = add(self, *document)  # type: ignore[arg-type]
        held.append((self._tokens, len(self._documents)))
        return finished

    monkeypatch.setattr(shuffle.ShuffledWriter, "add", counted)
    run(corpus, tmp_path / "out", 0, shard_tokens=1 << 30)
    assert max(tokens for tokens, _ in held) < 3000
    assert 5 < max(documents for _, documents in held) <= 3000 // 96
    assert len(read_manifest(tmp_path / "out").shards) == 1
    assert len(texts(tmp_path / "out")) == FOLDERS * FILES


class _Broken:
    """A source that ends in an error after so many documents."""

    def __init__(self, source: TextSource, documents: int) -> None:
        self._source, self._documents = source, documents

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def shuffled(self, seed: int) -> _Broken:
        return _Broken(self._source.shuffled(seed), self._documents)

    def documents(self, first_part: int = 0) -> object:
        for number, document in enumerate(self._source.documents(first_part)):
            if number == self._documents:
                raise UserError("stopped")
            yield document


def test_an_interrupted_run_resumes_to_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shuffle, "BUFFER_TOKENS", 5000)
    monkeypatch.setattr(encode, "BATCH_BYTES", 1)  # the error comes when documents before it are written
    whole = run(corpus, tmp_path / "whole", 0)
    source = FileSource(find_files([str(corpus)]))
    with pytest.raises(UserError, match="stopped"):
        shard(_Broken(source, 400), options(tmp_path / "out", 0))  # type: ignore[arg-type]
    assert list((tmp_path / "out").glob("*.tar")), "nothing was finished before"
    with pytest.raises(UserError, match="--seed"):
        run(corpus, tmp_path / "out", 1)
    assert run(corpus, tmp_path / "out", 0) == whole
