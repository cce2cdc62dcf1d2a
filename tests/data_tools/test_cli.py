from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools.cli import main
from nextlat_dist.data.loader import RowLoader
from nextlat_dist.data.tokenizer import Tokenizer
from tests.kit.datasets import numbered_documents, tiny_tokenizer, write_dataset
from tests.kit.no_torch import BLOCK_TORCH
from tests.kit.processes import descendants, running, wait_for
from tests.kit.tars import text_files, write_tar

COMMAND = [sys.executable, "-m", "data_tools.cli"]


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=300, check=False
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")
    )


def test_from_text_to_rows(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.py").write_text(f"def f_{number}(x):\n    return x + {number}\n" * 20)
    tokenizer = tmp_path / "tokenizer.model"
    trained = run("tokenizer", "--input", source, "--output", tokenizer, "--vocab-size", 300)
    assert (trained.returncode, "300 ids" in trained.stdout) == (0, True), trained.stderr
    arguments = ["--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "data"]
    sharded = run("shard", *arguments, "--validation-fraction", 0.2, "--workers", 2)
    assert sharded.returncode == 0, sharded.stderr
    assert "MB/s" in sharded.stderr or "kB/s" in sharded.stderr
    assert "M tokens/s" in sharded.stderr
    assert sharded.stdout.splitlines()[0].startswith(f"{tmp_path}/data/train: ")
    inspected = run("inspect", tmp_path / "data/train", "--samples", 1, "--png", tmp_path / "lengths.png")
    assert inspected.returncode == 0, inspected.stderr
    assert "⟦bos⟧def f_" in inspected.stdout
    assert (tmp_path / "lengths.png").is_file()
    loader = RowLoader(
        tmp_path / "data/train",
        sequence_length=32,
        packing="concat",
        global_batch_size=2,
        seed=0,
        shuffle=True,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    assert loader.next_batch().tokens.shape == (2, 33)


def test_standard_input_and_exact_options(tmp_path: Path) -> None:
    lines = b"".join(b'{"body": "line %d", "ask": "q"}\n' % number for number in range(10))
    arguments = ["shard", "--input", "-", "--format", "jsonl", "--field", "body", "--prompt-field", "ask"]
    arguments += ["--tokenizer", tiny_tokenizer(), "--output", tmp_path / "data", "--split", "validation", "--no-bos"]
    result = run(*arguments, "--no-eos", "--workers", 1, stdin=lines)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert (manifest["split"], manifest["bos"], manifest["eos"], manifest["has_prompts"]) == (
        "validation",
        False,
        False,
        True,
    )
    assert manifest["totals"]["documents"] == 10


def test_sharding_works_where_torch_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    arguments = [
        "shard",
        "--input",
        "a.txt",
        "--tokenizer",
        str(tiny_tokenizer()),
        "--output",
        "data",
        "--workers",
        "1",
    ]
    code = BLOCK_TORCH + f"from data_tools.cli import main\nassert main({arguments!r}) == 0\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    assert (tmp_path / "data/manifest.json").is_file()


def bad_input(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Command lines that must fail, and what the sentence must say."""
    files = {
        "empty.txt": b"",
        "latin.txt": b"caf\xe9",
        "good.txt": b"good text",
        "bad.jsonl": b'{"text": "x"}\n{"text": ',
        "split.jsonl": b'{"text": "x", "split": "test"}',
        "cut.jsonl.gz": b"\x1f\x8b\x08\x00",
        "foreign/manifest.json": b'{"shards": ["a.tar"]}',
        "broken/manifest.json": b"{",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("edited", "cut", "flipped", "unindexed", "finished"):
        write_dataset(folder / name, numbered_documents([40] * 8))
        (folder / name / "tokenizer.model").write_bytes(tiny_tokenizer().read_bytes())
    manifest = folder / "edited/manifest.json"
    manifest.write_text(manifest.read_text().replace('"documents": 8', '"documents": 9'))
    shard = "train-000000.tar"
    (folder / "cut" / shard).write_bytes((folder / "cut" / shard).read_bytes()[:2048])
    (folder / "unindexed/train-000000.index.npy").unlink()

    numbers = itertools.count()

    def shard_of(name: str, *more: object) -> list[object]:
        output = folder / "out" / f"{next(numbers)}"  # cases run side by side, and an output has one writer
        return ["shard", "--input", folder / name, "--tokenizer", tiny_tokenizer(), "--output", output, *more]

    return {
        "empty input": (shard_of("empty.txt"), "no document with text"),
        "no input": (shard_of("none.txt"), "does not exist or has no file"),
        "nothing left": (shard_of(".", "--glob", "*.rs"), "no file left after --glob"),
        "not UTF-8": (shard_of("latin.txt", "--on-invalid", "fail"), "latin.txt is not UTF-8 at byte 3"),
        "not UTF-8 in a worker": (shard_of("latin.txt", "--on-invalid", "fail", "--workers", 2), "not UTF-8 at byte 3"),
        "bad JSON": (shard_of("bad.jsonl"), "bad.jsonl line 2 is not JSON"),
        "bad field": (shard_of("bad.jsonl", "--field", "body"), "line 1 has no field 'body'"),
        "bad split": (shard_of("split.jsonl", "--split-field", "split"), "has the split 'test'"),
        "bad compression": (shard_of("cut.jsonl.gz"), "cut.jsonl.gz cannot be read"),
        "bad fraction": (shard_of("good.txt", "--validation-fraction", 2), "--validation-fraction is 2.0"),
        "one document for two splits": (shard_of("good.txt", "--validation-fraction", 0.5), "falls into the"),
        "finished output": (
            ["shard", "--input", folder / "good.txt", "--tokenizer", tiny_tokenizer(), "--output", folder / "finished"],
            "already holds a dataset",
        ),
        "no tokenizer": (
            ["shard", "--input", folder / "good.txt", "--tokenizer", folder / "good.txt", "--output", folder / "out"],
            "is not a sentencepiece model",
        ),
        "vocabulary": (
            ["tokenizer", "--input", folder / "good.txt", "--output", folder / "t.model", "--vocab-size", 4096],
            "cannot make a vocabulary of 4096",
        ),
        "no text to train on": (
            ["tokenizer", "--input", folder / "empty.txt", "--output", folder / "t.model", "--vocab-size", 300],
            "no text to train",
        ),
        "missing manifest": (["inspect", folder], "is not a finished dataset"),
        "foreign manifest": (["inspect", folder / "foreign"], "is not a manifest written by"),
        "broken manifest": (["inspect", folder / "broken"], "is not JSON"),
        "edited manifest": (["inspect", folder / "edited"], "changed after it was written"),
        "shard cut short": (["inspect", folder / "cut"], "has 2048 bytes where the manifest says"),
        "missing index": (["inspect", folder / "unindexed"], "is missing"),
        "other tokenizer": (["inspect", folder / "finished"], "is not the tokenizer that made"),
        "stdlib fraction": (["stdlib", "--output", folder, "--validation-fraction", 0], "--validation-fraction is 0.0"),
    }


def test_bad_input_ends_with_one_sentence(tmp_path: Path) -> None:
    cases = bad_input(tmp_path)
    processes = {}
    for name, (arguments, _) in cases.items():
        while sum(p.poll() is None for p in processes.values()) >= 3:
            time.sleep(0.01)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes[name] = subprocess.Popen([*COMMAND, *map(str, arguments)], **pipes)  # type: ignore[call-overload]
    for name, process in processes.items():
        out, error = process.communicate(timeout=300)
        lines = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        assert process.returncode == 2, (name, error)
        assert "Traceback" not in error, (name, error)
        assert len(lines) == 1, (name, error)
        assert error.rstrip().endswith(lines[0]), (name, "the sentence is the last line", error)
        assert cases[name][1] in lines[0], (name, error)
        assert out == "", (name, out)
    assert not (tmp_path / "t.model").exists()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(("manifest.json", ".tmp"))]


def test_bad_datasets_end_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, edited, unindexed, plain = (tmp_path / name for name in ("good", "edited", "unindexed", "plain"))
    for dataset in (good, edited, unindexed):
        write_dataset(dataset, numbered_documents([40] * 8), tokenizer=Tokenizer(tiny_tokenizer()))
    manifest = edited / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"documents": 8', '"documents": 9'))
    (unindexed / "train-000000.index.npy").unlink()
    plain.mkdir()
    shutil.copy(good / "train-000000.tar", plain)
    write_tar(tmp_path / "collide.tar", [("a.b.txt", b"text"), ("a.c.txt", b"text")])
    write_tar(tmp_path / "cut.tar", [("a.txt", b"text")])
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:1024])
    index = ["index", "--tokenizer", tiny_tokenizer()]
    adopted = ["--output", tmp_path / "adopted"]
    out = ["--output", tmp_path / "out"]
    cases: list[tuple[list[object], str]] = [
        ([*index, tmp_path / "none"], "does not exist"),
        ([*index, tmp_path, *adopted, "--text-field", "x", "--token-member", "y"], "tokens have no fields"),
        ([*index, plain, *adopted], "no document in members .txt, only 4 ends.npy, 4 tokens.npy"),
        ([*index, tmp_path / "cut.tar", *adopted], "is cut off at byte 1024"),
        ([*index, tmp_path / "collide.tar", *adopted], "a.b.txt and a.c.txt"),
        ([*index, good, "--token-member", ".tokens.npy"], "holds a dataset of its own"),
        (["index", plain, "--tokenizer", tmp_path / "cut.tar"], "is not a sentencepiece model"),
        (["verify", good, tmp_path], "is not a finished dataset"),
        (["inspect", edited], "changed after it was written"),
        (["inspect", "ftp://host/data"], "ftp"),
        (["reshard", good, tmp_path, *out], "is not a finished dataset"),
        (["reshard", good, edited, *out], "changed after it was written"),
        (["reshard", good, unindexed, *out], "index.npy of shard train-000000.tar is missing"),
        (["reshard", good, "--output", good], "one of the datasets to read"),
        (["reshard", good, *out, "--shard-tokens", 0], "--shard-tokens is 0"),
        (["mix-preview", "--source", f"a={tmp_path}:1", "--tokens", 9999], "is not a finished dataset"),
        (["mix-preview", "--source", "a=b", "--tokens", 9999], "is not NAME=DIR:WEIGHT"),
    ]
    for arguments, message in cases:
        assert main([str(argument) for argument in arguments]) == 2, arguments
        out_text, error = capsys.readouterr()
        assert out_text == ""
        last = error.replace("\r", "\n").splitlines()[-1]
        assert last.startswith("error: "), (arguments, error)
        assert message in last, (arguments, error)
    assert not list(tmp_path.glob("out/manifest.json")) + list(tmp_path.glob("adopted/manifest.json"))


def test_from_tars_of_text_to_a_verified_dataset(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = {f"{number:03d}": f"def f_{number}(x): return x + {number}\n" * 9 for number in range(50)}
    write_tar(tmp_path / "tars/a.tar", text_files(texts))
    tars, data = str(tmp_path / "tars"), str(tmp_path / "data")
    assert main(["index", tars, "--tokenizer", str(tiny_tokenizer())]) == 0
    out, progress = capfd.readouterr()
    assert "other members, not read: 50 jpg, 50 pkl" in out
    assert "B/s" in progress
    assert main(["reshard", tars, "--output", data]) == 0
    out, progress = capfd.readouterr()
    assert out.startswith(f"{data}: 50 documents, ")
    assert "tokens/s" in progress
    verified = run("verify", tars, data)
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "everything is as it was written")
    assert "B/s" in verified.stderr
    shard = tmp_path / "data/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert run("verify", data).returncode == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to see processes")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_under_a_final_name(
    tmp_path: Path, workers: int, sent: signal.Signals
) -> None:
    """It is stopped while a shard is open: standard input never ends."""
    output = tmp_path / "data"
    arguments = ["shard", "--input", "-", "--tokenizer", tiny_tokenizer(), "--output", output, "--workers", workers]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments), "--record-tokens", "100", "--no-shuffle"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        for _ in range(8 if workers > 1 else 1):  # enough that the workers hand back their first results
            process.stdin.write((b"one line of text " * 20 + b"\n") * 3500)
        process.stdin.flush()
        wait_for(lambda: list(output.glob(".train-*.tmp")))
        children = descendants(process.pid)
        assert len(children) >= (workers if workers > 1 else 0)
        # Ctrl-C reaches the whole group of the terminal, a kill the one process.
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)
        else:
            process.kill()
        error = b""
        process.wait(timeout=120)
        wait_for(lambda: not any(running(child) for child in children))
        error = process.stderr.read()
    finally:
        process.kill()
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert error.decode().rstrip().endswith("interrupted")
        assert b"Traceback" not in error
        assert list(output.iterdir()) == []
    else:
        assert [path.name for path in output.iterdir()] == [".train-000000.tar.tmp"]
