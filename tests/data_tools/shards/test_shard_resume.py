"""An interrupted `shard` resumes: the same bytes as an uninterrupted one, without doing finished shards again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from data_tools.shards.journal import JOURNAL_FILE, ShardJournal
from data_tools.shards.pending import PendingDocuments
from data_tools.shards.shard import ShardOptions, shard
from data_tools.text.find import find_files
from data_tools.text.hf_source import HfSource
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource, TextDocument, TextSource
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.errors import UserError
from nextlat_dist.files import sole_writer
from tests.kit.corpora import TEXTS, contents
from tests.kit.datasets import tiny_tokenizer
from tests.kit.processes import descendants, running, wait_for

TWO_SPLITS = {"validation_fraction": 0.3}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of many documents and two of one; some documents are left out or changed."""
    root = tmp_path / "corpus"
    root.mkdir()
    for part in range(3):
        rows = [{"text": text} for text in TEXTS[40 * part : 40 * part + 40]]
        rows[7]["text"], rows[20]["text"] = "", "\ud800"
        (root / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / f"{part}.txt").write_text(f"a text of its own, number {part}")
    return root


def options(output: Path, **changes: Any) -> ShardOptions:
    return replace(ShardOptions(tiny_tokenizer(), output, record_tokens=300, shard_tokens=1600), **changes)


def run(corpus: Path, output: Path, **changes: Any) -> None:
    shard(FileSource(find_files([str(corpus)])), options(output, **changes))


def in_child(work: Callable[[], object]) -> int:
    """Wait status of a forked process that does this work, which leaves it when the work is done."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Do this work in a process that is killed before its n-th opening, renaming or removing of a file."""

    def work_and_die() -> None:
        left = iter(range(event))

        def count(name: str, _: object) -> None:
            if name in ("open", "os.rename", "os.remove") and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    status = in_child(work_and_die)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("changes", [{}, TWO_SPLITS], ids=["one split", "two splits"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(corpus, tmp_path / "clean", **changes)
    clean = contents(tmp_path / "clean")
    assert len(clean) > 8
    resumed = 0
    for event in [*range(1, 30, 6), *range(30, 1000, 13)]:
        output = tmp_path / f"killed at {event}"
        if not killed_at(event, lambda output=output: run(corpus, output, **changes)):  # type: ignore[misc]
            break
        assert not list(output.rglob("manifest.json")) or (output / JOURNAL_FILE).exists()
        resumed += (output / JOURNAL_FILE).exists()
        run(corpus, output, **changes)
        assert contents(output) == clean, event
    else:
        raise AssertionError("no run came to its end")
    assert resumed > 3


@pytest.mark.parametrize(("workers", "events"), [(1, (15, 75)), (2, (40, 105))])
def test_killed_again_and_again_it_comes_to_its_end(
    corpus: Path, tmp_path: Path, workers: int, events: tuple[int, int]
) -> None:
    run(corpus, tmp_path / "clean", **TWO_SPLITS)
    chance, kills = random.Random(workers), 0
    while killed_at(
        chance.randrange(*events), lambda: run(corpus, tmp_path / "out", **TWO_SPLITS, workers=workers, overwrite=True)
    ):
        kills += 1
    assert kills > 2 - workers
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


class Interrupted:
    """A source in which Ctrl-C comes after so many documents."""

    def __init__(self, source: TextSource, documents: int) -> None:
        self._source, self._documents = source, documents
        self.parts, self.total_bytes, self.identity = source.parts, source.total_bytes, source.identity

    def documents(self, first_part: int = 0) -> Iterator[TextDocument]:
        for number, document in enumerate(self._source.documents(first_part)):
            if number == self._documents:
                raise KeyboardInterrupt
            yield document


def interrupt(source: TextSource, output: Path, documents: int, **changes: Any) -> list[str]:
    """Ctrl-C after so many documents; returns the shards that are finished. Every document is a batch of its own."""
    with pytest.raises(KeyboardInterrupt):
        shard(Interrupted(source, documents), options(output, **changes))
    lines = (output / JOURNAL_FILE).read_text().splitlines()
    assert not list(output.rglob(".*.tmp"))
    return [line["entry"]["name"] for line in map(json.loads, lines[1:])]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the whole corpus is one batch, and nothing is written before all of it is read."""
    monkeypatch.setattr("data_tools.shards.encode.BATCH_BYTES", 1)


@pytest.mark.parametrize("changes", [{}, TWO_SPLITS], ids=["one split", "two splits"])
def test_finished_shards_are_not_touched_and_finished_files_not_read(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path / "clean", **changes)
    output = tmp_path / "out"
    finished = interrupt(FileSource(find_files([str(corpus)])), output, 105, **changes)
    assert len(finished) > 3
    before = {path: path.stat() for path in output.rglob("*-0*.*")}
    assert len(before) == 2 * len(finished)
    # The first file is another one now, but for its name, size and time: it must not be opened.
    first = corpus / "0.jsonl"
    status = first.stat()
    first.write_bytes(b"x" * status.st_size)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    run(corpus, output, **changes)
    assert contents(output) == contents(tmp_path / "clean")
    for path, old in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (old.st_ino, old.st_mtime_ns), path
    said = capsys.readouterr().err
    documents = sum(
        entry.documents
        for directory in ([output] if not changes else [output / "train", output / "validation"])
        for entry in read_manifest(directory).shards
        if entry.name in finished
    )
    assert f"resuming: {len(finished)} shards kept, {documents:,} documents skipped" in said


def test_documents_of_finished_shards_are_not_encoded_again(corpus: Path, tmp_path: Path) -> None:
    source, plan = FileSource(find_files([str(corpus)])), options(tmp_path / "out", **TWO_SPLITS)
    interrupt(source, tmp_path / "out", 105, **TWO_SPLITS)
    lines = (tmp_path / "out" / JOURNAL_FILE).read_text().splitlines()
    journal = ShardJournal(tmp_path / "out", plan.splits, json.loads(lines[0]), overwrite=False)
    done = {shard.split: shard.mark for shard in journal.finished}
    assert len(done) == 2
    assert done["train"].documents != done["validation"].documents
    left = [document.name for document in PendingDocuments(source, plan.split_of, done).documents()]
    expected = [
        document.name
        for number, document in enumerate(source.documents(), 1)
        if number > done[plan.split_of(document)].documents
    ]
    assert left == expected
    assert len(left) < 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"record_tokens": 301}, "--record-tokens 300, not 301"),
        ({"shard_tokens": 999}, "--shard-tokens 1600, not 999"),
        ({"bos": False}, "--bos True, not False"),
        ({"on_invalid": "skip"}, "--on-invalid replace, not skip"),
        (TWO_SPLITS, "--validation-fraction None, not 0.3"),
        ({"split": "validation"}, "--split train, not validation"),
    ],
)
def test_other_settings_cannot_go_on(corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    interrupt(FileSource(find_files([str(corpus)])), tmp_path / "out", 105)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=f"an unfinished run with {message}; repeat .* --overwrite"):
        run(corpus, tmp_path / "out", **changes)
    assert contents(tmp_path / "out") == before
    run(corpus, tmp_path / "out", overwrite=True, **changes)
    run(corpus, tmp_path / "clean", **changes)
    found = contents(tmp_path / "out")
    assert contents(tmp_path / "clean").items() <= found.items()
    assert JOURNAL_FILE not in found


def test_another_input_field_or_tokenizer_cannot_go_on(corpus: Path, tmp_path: Path) -> None:
    source = FileSource(find_files([str(corpus)]))
    interrupt(source, tmp_path / "out", 105)
    with pytest.raises(UserError, match="with --prompt-field None, not q"):
        shard(replace(source, fields=Fields(prompt="q")), options(tmp_path / "out"))
    model = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer().read_bytes())
    model.trainer_spec.model_prefix = "other"
    other = tmp_path / "other.model"
    other.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"with tokenizer \(sha256\)"):
        run(corpus, tmp_path / "out", tokenizer=other)
    (corpus / "2.txt").write_text("now a longer text than before")
    with pytest.raises(UserError, match=r"with other input files \(names, sizes or times differ\)"):
        run(corpus, tmp_path / "out")


def stdin_of(monkeypatch: pytest.MonkeyPatch, path: Path, lines: list[str]) -> TextSource:
    path.write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(sys, "stdin", path.open())
    return FileSource(find_files(["-"]))


def test_standard_input_goes_on_when_it_is_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [text.replace("\n", " ") for text in TEXTS]
    text, output = tmp_path / "text", tmp_path / "out"
    shard(stdin_of(monkeypatch, text, lines), options(tmp_path / "clean"))
    assert len(interrupt(stdin_of(monkeypatch, text, lines), output, 60)) > 2
    for other in (["another", *lines[1:]], lines[:10]):
        with pytest.raises(UserError, match="documents of the input are not those of the unfinished run"):
            shard(stdin_of(monkeypatch, text, other), options(output))
    shard(stdin_of(monkeypatch, text, lines), options(output))
    assert contents(output) == contents(tmp_path / "clean")


@pytest.mark.parametrize("damage", ["shard missing", "shard cut", "index missing", "index flipped"])
def test_a_finished_shard_that_is_gone_is_written_again(corpus: Path, tmp_path: Path, damage: str) -> None:
    run(corpus, tmp_path / "clean")
    finished = interrupt(FileSource(find_files([str(corpus)])), tmp_path / "out", 105)
    assert len(finished) > 3
    victim = tmp_path / "out" / (finished[2] if "shard" in damage else finished[2].replace(".tar", ".index.npy"))
    data = victim.read_bytes()
    if "missing" in damage:
        victim.unlink()
    else:
        victim.write_bytes(data[:-512] if "cut" in damage else data[:-1] + bytes([data[-1] ^ 1]))
    kept = (tmp_path / "out" / finished[1]).stat().st_ino
    run(corpus, tmp_path / "out")
    assert (tmp_path / "out" / finished[1]).stat().st_ino == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_a_journal_is_good_up_to_where_it_was_cut(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "clean")
    source = FileSource(find_files([str(corpus)]))
    interrupt(source, tmp_path / "first", 105)
    whole = (tmp_path / "first" / JOURNAL_FILE).read_bytes()
    ends = [number for number, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 5, ends[0], ends[0] + 1, ends[1], ends[1] + 1, len(whole) - 1):
        output = tmp_path / f"cut at {cut}"
        interrupt(source, output, 105)
        (output / JOURNAL_FILE).write_bytes(whole[:cut])
        run(corpus, output)
        assert contents(output) == contents(tmp_path / "clean"), cut


def test_an_output_has_one_writer(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with sole_writer(tmp_path / "out"), pytest.raises(UserError, match="another process is writing to"):
        run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "out")


def test_a_streamed_dataset_goes_on_without_its_finished_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(3):
        parquet.write_table(pyarrow.table({"text": TEXTS[40 * part : 40 * part + 40]}), folder / f"{part}.parquet")

    def source() -> HfSource:
        return HfSource("parquet", Fields(), config=None, split="train", data_files=[f"{folder}/*.parquet"])

    shard(source(), options(tmp_path / "clean"))
    finished = interrupt(source(), tmp_path / "out", 100)
    assert len(finished) > 3
    first, interrupted = folder / "0.parquet", tmp_path / "changed"
    interrupt(source(), interrupted, 100)
    opened = []
    resumed = source()

    class Watched(Interrupted):
        def documents(self, first_part: int = 0) -> Iterator[TextDocument]:
            opened.append(first_part)
            return resumed.documents(first_part)

    shard(Watched(resumed, 0), options(tmp_path / "out"))
    assert opened[0] > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    parquet.write_table(pyarrow.table({"text": ["other"]}), first)
    with pytest.raises(UserError, match="with other files of the dataset"):
        shard(source(), options(interrupted))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see processes")
def test_ctrl_c_stops_the_command_at_once_and_it_goes_on(tmp_path: Path) -> None:
    """Two workers; standard input stays open, so that the run is in the middle when it is stopped."""
    lines = "".join(f"{number} {text!r}\n" for number in range(250) for text in TEXTS[:100])
    arguments = ["shard", "--input", "-", "--tokenizer", str(tiny_tokenizer()), "--output", str(tmp_path / "out")]
    arguments += ["--workers", "2", "--shard-tokens", "100000", "--no-shuffle"]
    command = [sys.executable, "-m", "data_tools.cli", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        process.stdin.write(lines.encode())
        process.stdin.flush()
        wait_for((tmp_path / "out" / JOURNAL_FILE).exists)
        children = descendants(process.pid)
        assert len(children) >= 2
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.wait(timeout=120)
        error = process.stderr.read().decode()
        wait_for(lambda: not any(running(child) for child in children))
    finally:
        process.kill()
    assert process.returncode == 130
    said = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "shard:" not in line]
    assert said == ["interrupted"]
    assert not list((tmp_path / "out").glob(".*.tmp"))
    text = tmp_path / "text"
    text.write_text(lines)
    for output in ("out", "clean"):
        with text.open() as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", file)
            patch.setattr("data_tools.shards.encode.BATCH_BYTES", 1 << 20)
            shard(FileSource(find_files(["-"])), ShardOptions(tiny_tokenizer(), tmp_path / output, shard_tokens=100000))
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(corpus: Path, tmp_path: Path) -> None:
    """The source kills one when the first shard is finished, as a system without memory would."""
    source = FileSource(find_files([str(corpus)]))

    class Deadly(Interrupted):
        def documents(self, first_part: int = 0) -> Iterator[TextDocument]:
            for document in source.documents(first_part):
                if (tmp_path / "out" / JOURNAL_FILE).exists():
                    for child in descendants(os.getpid())[-1:]:
                        with contextlib.suppress(ProcessLookupError):  # the pool is ending already
                            os.kill(child, signal.SIGKILL)
                yield document

    with pytest.raises(UserError, match="a worker process was killed"):
        shard(Deadly(source, 0), options(tmp_path / "out", workers=2))
    run(corpus, tmp_path / "out")
    run(corpus, tmp_path / "clean")
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
