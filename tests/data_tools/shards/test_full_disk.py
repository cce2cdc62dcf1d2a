"""A disk that is really full, and files that may really not grow: one sentence, and the next run resumes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_tools.cli import main
from data_tools.shards.journal import JOURNAL_FILE
from tests.kit.corpora import TEXTS, contents
from tests.kit.datasets import tiny_tokenizer


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The first shards are small, the last one is not."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "long " * 40000]))
    return path


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.shards.encode.BATCH_BYTES", 1)


def command(corpus: Path, output: Path) -> list[str]:
    arguments = ["shard", "--input", str(corpus), "--tokenizer", str(tiny_tokenizer()), "--output", str(output)]
    return [*arguments, "--record-tokens", "300", "--shard-tokens", "2000", "--workers", "1"]


def outcome(arguments: list[str], errors: Path, before: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Exit status and standard error of the command in a forked process, whose limits can be lowered before."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(errors, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            with os.fdopen(descriptor, "w") as file, contextlib.redirect_stderr(file):
                before()
                status = main(arguments)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), errors.read_text()


def assert_one_sentence(error: str, reason: str) -> None:
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip() and "shard:" not in line]
    lines = [line for line in lines if not line.startswith("resuming: ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: cannot write to "), error
    assert reason in lines[0]
    assert "run the same command again" in lines[0]


def test_a_file_that_may_not_grow_ends_with_a_sentence_and_the_next_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Works without privileges; the system answers EFBIG in place of ENOSPC."""
    assert main(command(corpus, tmp_path / "clean")) == 0
    largest = max(path.stat().st_size for path in (tmp_path / "clean").iterdir())
    output = tmp_path / "out"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, resource.RLIM_INFINITY))

    status, error = outcome(command(corpus, output), tmp_path / "errors", limit)
    assert status == 2, error
    assert_one_sentence(error, "File too large")
    left = contents(output)
    finished = [json.loads(line) for line in (output / JOURNAL_FILE).read_text().splitlines()[1:]]
    assert len(finished) > 2
    assert len(left) == 2 * len(finished) + 1, "finished shards, their indices and the journal"
    status, error = outcome(command(corpus, output), tmp_path / "errors")
    assert status == 0, error
    assert f"resuming: {len(finished)} shards kept" in error
    assert contents(output) == contents(tmp_path / "clean")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own; each call gives it another size, and the first one makes it."""
    mounted: list[Path] = []

    def of_size(kibibytes: int) -> Path:
        path = tmp_path / "disk"
        path.mkdir(exist_ok=True)
        how = f"{'remount,' if mounted else ''}size={kibibytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", path], check=False, capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a file system here")
        mounted[:] = [path]
        return path

    yield of_size
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a file system")
def test_a_disk_that_is_full_again_and_again(corpus: Path, tmp_path: Path, disk: Callable[[int], Path]) -> None:
    """It is full at another place each time: in a shard, an index, the journal, the tokenizer or the manifest."""
    assert main(command(corpus, tmp_path / "clean")) == 0
    whole = sum(path.stat().st_size for path in (tmp_path / "clean").iterdir()) // 1024
    failures, kept = 0, 0
    for size in range(4, 4 * whole, 20):
        status, error = outcome(command(corpus, disk(size) / "out"), tmp_path / "errors")
        if status == 0:
            break
        assert status == 2, error
        assert_one_sentence(error, "No space left on device")
        assert not list((tmp_path / "disk").rglob("*.tmp"))
        assert not list((tmp_path / "disk").rglob("manifest.json"))
        failures += 1
        kept += "resuming: " in error
    else:
        raise AssertionError("no run came to its end")
    assert failures > 5
    assert kept > 3
    assert contents(tmp_path / "disk" / "out") == contents(tmp_path / "clean")
