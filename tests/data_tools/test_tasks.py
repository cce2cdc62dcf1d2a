from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.tasks import TaskOptions, write_task
from nextlat_dist.data.members import split_members
from nextlat_dist.data.shard_format import Record, read_index, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.tasks import Task, make_task, task_of, words_of
from nextlat_dist.tasks.path_star import PathStar
from nextlat_dist.tasks.state_tracking import StateTracking

STAR = {"arms": 2, "length": 3, "nodes": 5}  # 60 graphs with 2 goals and 24 orders of the edges each


def _write(directory: Path, task: Task, train: int = 40, test: int = 10, seed: int = 0) -> Path:
    write_task(task, TaskOptions(directory, train, test, seed, record_tokens=100, shard_tokens=400))
    return directory


def _members(dataset: Path) -> Iterator[dict[str, bytes]]:
    """Of every record, read by the index."""
    place = open_storage(str(dataset))
    for shard in read_manifest(place).shards:
        data = (dataset / shard.name).read_bytes()
        for offset, length, *_ in read_index(place, shard).tolist():
            yield split_members(data[offset : offset + length])


def _documents(dataset: Path) -> list[list[int]]:
    records = map(Record.from_members, _members(dataset))
    return [part.tolist() for record in records for part in np.split(record.tokens, record.ends[:-1])]


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _graph(task: PathStar, document: list[int]) -> frozenset[str]:
    words = words_of(task, document)
    return frozenset(" ".join(words[1 : words.index("/")]).split(" | "))


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    task = StateTracking(length=5, group="S3", test_length=(8,))
    one, two, other = (
        _files(_write(tmp_path / name, task, seed=seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one == two
    assert len(one) > 6
    changed = {name for name in one if one[name] != other.get(name)}
    assert {"train/train-000000.tar", "test/test-000000.tar"} <= changed
    assert "train/tokenizer.model" not in changed


def test_train_and_test_share_no_graph_though_there_are_few(tmp_path: Path) -> None:
    task = PathStar(**STAR)
    data = _write(tmp_path, task, train=1500, test=20)
    sets = {split: _documents(data / split) for split in ("train", "test")}
    assert {split: len(documents) for split, documents in sets.items()} == {"train": 1500, "test": 20}
    graphs = {split: {_graph(task, document) for document in documents} for split, documents in sets.items()}
    assert not graphs["train"] & graphs["test"]
    assert len(graphs["train"] | graphs["test"]) == 60
    for documents in sets.values():
        assert len(set(map(tuple, documents))) == len(documents)


def test_train_documents_are_no_beginnings_of_longer_test_documents(tmp_path: Path) -> None:
    task = StateTracking(length=3, group="S3", test_length=(5,))  # 216 words
    data = _write(tmp_path, task, train=150, test=50)
    test = {tuple(document[1:4]) for document in _documents(data / "test")}
    train = {tuple(document[1:4]) for document in _documents(data / "train")}
    assert (len(train), train & test) == (150, set())


def test_more_training_documents_begin_with_the_same_ones(tmp_path: Path) -> None:
    task = PathStar(**STAR)
    few, more = (_write(tmp_path / str(train), task, train=train) for train in (30, 60))
    assert _documents(more / "train")[:30] == _documents(few / "train")
    assert _documents(more / "test") == _documents(few / "test")


def test_a_seed_draws_each_set_on_its_own(tmp_path: Path) -> None:
    task = PathStar(arms=2, length=5, nodes=40)
    train = _documents(_write(tmp_path / "a", task, train=20, test=1) / "train")
    test = _documents(_write(tmp_path / "b", task, train=1, test=20) / "test")
    assert not set(map(tuple, train)) & set(map(tuple, test))


def test_a_task_with_too_few_documents_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"gave \d+ different documents for the train set, then 10000 in a row"
    ) as error:
        _write(tmp_path / "a", StateTracking(length=2, group="Z2"), train=4, test=1)
    assert "gave 3 different" in str(error.value)
    with pytest.raises(UserError, match="gave 4 different documents for the test set"):
        _write(tmp_path / "b", StateTracking(length=2, group="Z2"), train=1, test=5)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("manifest.json"))


def test_the_record_holds_labels_and_beliefs_next_to_the_tokens(tmp_path: Path) -> None:
    tracking = StateTracking(length=5, group="S3", test_length=(6,))
    data = _write(tmp_path / "s3", tracking)
    for split, length in (("train", 5), ("test", 6)):
        seen = 0
        for members in _members(data / split):
            record = Record.from_members(members)
            assert set(record.lengths.tolist()) == {length + 2}
            assert record.labels is not None
            assert record.prompts is not None
            assert set(record.prompts.tolist()) == {2}
            for tokens, labels in zip(
                *(np.split(a, record.ends[:-1]) for a in (record.tokens, record.labels)), strict=True
            ):
                elements = tokens[1:-1].astype(np.int64) - 4
                assert (labels[2:] == tracking.products(elements) + 4).all()
                seen += 1
        assert seen == read_manifest(open_storage(str(data / split))).documents
    process = make_task("hmm", {"length": 9})
    for members in _members(_write(tmp_path / "hmm", process) / "test"):
        beliefs = np.load(io.BytesIO(members["beliefs.npy"]), allow_pickle=False)
        record = Record.from_members(members)
        assert beliefs.dtype == np.float32
        for tokens, found in zip(*(np.split(a, record.ends[:-1]) for a in (record.tokens, beliefs)), strict=True):
            exact = process.beliefs(tokens.astype(np.int64))  # type: ignore[attr-defined]
            np.testing.assert_array_equal(found, exact.astype(np.float32))


def test_the_manifest_names_the_task(tmp_path: Path) -> None:
    task = StateTracking(length=4, generators=("(0 1 2)(3 4)", "(0 1)"), test_length=(6, 8))
    data = _write(tmp_path, task, seed=7)
    for split in ("train", "test"):
        manifest = read_manifest(open_storage(str(data / split)))
        assert task_of(manifest) == task
        assert (manifest.split, manifest.bos, manifest.eos, manifest.has_prompts) == (split, True, True, True)
        assert manifest.report["task"]["seed"] == 7
    hmm = _write(tmp_path / "hmm", make_task("hmm", {"length": 9}))
    assert not read_manifest(open_storage(str(hmm / "train"))).eos


@pytest.mark.parametrize(
    "options",
    [
        ["path-star", "--arms", "2", "--length", "3", "--nodes", "9"],
        ["countdown", "--inputs", "3", "--test-share", "0.2"],
        ["state-tracking", "--length", "4", "--generators", "(0 1 2)(3 4)", "(0 1)", "--test-length", "6", "8"],
        ["hmm", "--process", "mess3", "--length", "9", "--x", "0.2"],
        ["city", "--rows", "3", "--columns", "4", "--map-seed", "2"],
    ],
)
def test_the_command_writes_what_verify_accepts(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "data"
    command = ["task", *options, "--output", str(directory), "--train", "30", "--test", "5", "--record-tokens", "90"]
    command += ["--seed", "6"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"{directory / 'train'}: 30 documents" in printed
    assert f"{directory / 'test'}: 5 documents" in printed
    assert main(["verify", str(directory / "train"), str(directory / "test")]) == 0
    assert main(["inspect", str(directory / "test"), "--samples", "1"]) == 0
    assert "⟦bos⟧" in capsys.readouterr().out
    written = read_manifest(open_storage(str(directory / "train"))).report["task"]
    assert (written["name"], written["seed"]) == (options[0], 6)
    for option, value in {
        "--nodes": 9,
        "--test-share": 0.2,
        "--test-length": [6, 8],
        "--x": 0.2,
        "--map-seed": 2,
    }.items():
        if option in options:
            assert written["parameters"][option[2:].replace("-", "_")] == value
    assert main(command) == 2
    assert "already holds a dataset; pass --overwrite" in capsys.readouterr().err
    before = _files(directory)
    assert main([*command, "--overwrite"]) == 0
    assert _files(directory) == before


def test_an_unfinished_set_leaves_no_manifest_of_an_earlier_one(tmp_path: Path) -> None:
    task = StateTracking(length=2, group="Z2")
    options = TaskOptions(tmp_path, train=2, test=1)
    write_task(task, options)
    with pytest.raises(UserError, match="gave 3 different documents for the train set"):
        write_task(task, replace(options, train=4, overwrite=True))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("path-star --arms 3 --length 5 --nodes 12", "raise --nodes to at least 13"),
        ("path-star --arms 3 --length 5 --train 0", "--train is 0; it must be at least 1"),
        ("path-star --arms 3 --length 5 --test 0", "--test is 0; it must be at least 1"),
        ("path-star --arms 3 --length 5 --seed -1", "--seed is -1; it must not be negative"),
        ("path-star --arms 3 --length 5 --record-tokens 0", "--record-tokens is 0; it must be at least 1"),
        ("state-tracking --length 5 --group Q8", "--group Q8 is none of Sn and Zn"),
        ("state-tracking --length 5 --generators (01", "is no permutation in cycle notation"),
        ("state-tracking --length 5 --group S3 --test-length 4", "--test-length 4 is shorter than --length 5"),
        ("state-tracking --length 1 --group S3", "--length 1 is no task"),
    ],
)
def test_mistakes_end_with_a_sentence(
    options: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *given = options.split()
    assert main(["task", name, "--train", "5", "--test", "5", "--output", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_resharding_would_lose_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _write(tmp_path / "data", StateTracking(length=5, group="S3"))
    assert main(["reshard", str(data / "train"), "--output", str(tmp_path / "new")]) == 2
    assert "whose labels and beliefs would be lost" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
