from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.cli import main
from data_tools.shards.journal import JOURNAL_FILE
from data_tools.shards.reshard import ReshardOptions, reshard
from data_tools.tars.index import find_tars, index
from data_tools.verify import verify
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import (
    MANIFEST_FILE,
    Manifest,
    MembersEntry,
    manifest_bytes,
    read_manifest,
)
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import TOKENIZER_FILE
from tests.kit.datasets import tiny_tokenizer, write_dataset
from tests.kit.servers import file_server
from tests.kit.tars import text_files, write_tar

Documents = list[tuple[list[int], int]]


def make(directory: Path, seed: int, count: int, *, prompts: bool = False, **sizes: int) -> Documents:
    """A dataset of random documents, and these documents."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(5, 600, length) for length in generator.integers(1, 90, count)]
    masked = [int(generator.integers(0, len(document) + 1)) for document in documents] if prompts else None
    write_dataset(directory, documents, prompts=masked, tokenizer=Tokenizer(tiny_tokenizer()), **sizes)
    return [(document.tolist(), n) for document, n in zip(documents, masked or [0] * count, strict=True)]


def documents_of(dataset: Path | str) -> Documents:
    place = open_storage(dataset)
    storage = Records(place, read_manifest(place))
    found: Documents = []
    for number in range(len(storage)):
        record = storage.read(number)
        parts = np.split(record.tokens, record.ends[:-1])
        prompts = [0] * len(parts) if record.prompts is None else record.prompts.tolist()
        found += [(part.tolist(), prompt) for part, prompt in zip(parts, prompts, strict=True)]
    return found


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def run(*sources: Path | str, output: Path, **changes: Any) -> Manifest:
    options = ReshardOptions(output=output, record_tokens=200, shard_tokens=1000)
    return reshard([str(source) for source in sources], replace(options, **changes))


def rewrite(dataset: Path, **changes: Any) -> None:
    """A manifest with a good digest and other content."""
    (dataset / MANIFEST_FILE).write_bytes(manifest_bytes(replace(read_manifest(dataset), **changes)))


def test_documents_prompts_and_order_come_over(tmp_path: Path) -> None:
    first = make(tmp_path / "a", 0, 150, record_tokens=64, shard_tokens=700)
    second = make(tmp_path / "b", 1, 70, prompts=True, record_tokens=5000, shard_tokens=100000)
    manifest = run(tmp_path / "a", tmp_path / "b", output=tmp_path / "out")
    assert documents_of(tmp_path / "out") == first + second
    assert manifest.has_prompts
    assert manifest.records < read_manifest(tmp_path / "a").records
    assert all(shard.tokens >= 1000 for shard in manifest.shards[:-1])
    assert verify(str(tmp_path / "out")).problems == []
    assert not run(tmp_path / "a", output=tmp_path / "plain").has_prompts


def test_adopted_and_remote_datasets(tmp_path: Path) -> None:
    texts = {f"{number:02d}": f"text number {number}\n" * (number % 4) for number in range(12)}
    write_tar(tmp_path / "tars/a.tar", text_files(texts))
    tars = find_tars([str(tmp_path / "tars")], None)
    index(tars, Tokenizer(tiny_tokenizer()), MembersEntry("text", "txt"), split="train", bos=True, eos=True)
    expected = documents_of(tmp_path / "tars") + make(tmp_path / "b", 1, 30)
    with file_server(tmp_path / "b") as server:
        manifest = run(tmp_path / "tars", f"http://{server.address}", output=tmp_path / "out")
    assert documents_of(tmp_path / "out") == expected
    assert manifest.members.kind == "block"
    assert manifest.report["empty"] == {"count": 3, "names": ["00.txt", "04.txt", "08.txt"]}
    digests = [read_manifest(tmp_path / name).digest for name in ("tars", "b")]
    assert [source["digest"] for source in manifest.report["resharded"]] == digests
    assert (manifest.bos, manifest.eos, manifest.tokenizer.sha256) == (True, True, Tokenizer(tiny_tokenizer()).sha256)
    assert str(tmp_path) not in (tmp_path / "out" / MANIFEST_FILE).read_text()


def test_a_run_that_fails_leaves_no_dataset_and_goes_on(tmp_path: Path) -> None:
    documents = make(tmp_path / "a", 0, 60) + make(tmp_path / "b", 1, 150)
    sources = (tmp_path / "a", tmp_path / "b")
    run(*sources, output=tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    shard = sorted((tmp_path / "b").glob("*.tar"))[-2]
    good = shard.read_bytes()
    shard.write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    for _ in range(2):
        with pytest.raises(UserError, match=r"record \d+ at offset \d+ of shard .*damaged"):
            run(*sources, output=tmp_path / "out")
        left = contents(tmp_path / "out")
        assert MANIFEST_FILE not in left
        assert JOURNAL_FILE in left
        assert not [name for name in left if name.endswith(".tmp")]
    with pytest.raises(UserError, match="holds an unfinished run with other sources"):
        run(tmp_path / "a", output=tmp_path / "out")
    shard.write_bytes(good)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(kept) > 2
    run(*sources, output=tmp_path / "out")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert documents_of(tmp_path / "out") == documents
    assert contents(tmp_path / "out") == whole
    with pytest.raises(UserError, match="already holds a dataset; pass --overwrite"):
        run(*sources, output=tmp_path / "out")
    run(*sources, output=tmp_path / "out", overwrite=True, record_tokens=500)
    assert documents_of(tmp_path / "out") == documents


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "a", 0, 1000)
    options = ["--record-tokens", "200", "--shard-tokens", "1000"]
    command = ["reshard", str(tmp_path / "a"), "--output", str(tmp_path / "out"), *options]
    process = subprocess.Popen([sys.executable, "-m", "data_tools.cli", *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "out").glob("*.index.npy"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()
    with pytest.raises(UserError, match="holds an unfinished run with --record-tokens 200, not 300"):
        run(tmp_path / "a", output=tmp_path / "out", record_tokens=300)
    assert main(command) == 0
    run(tmp_path / "a", output=tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        make(tmp_path / name, 0, 20)
    small = tmp_path / "b" / TOKENIZER_FILE
    small.write_bytes(small.read_bytes() + b"\x0a\x00")
    entry = read_manifest(tmp_path / "b").tokenizer
    rewrite(tmp_path / "b", tokenizer=replace(entry, sha256=hashlib.sha256(small.read_bytes()).hexdigest()))
    rewrite(tmp_path / "c", eos=False)
    rewrite(tmp_path / "d", split="validation")
    cases = [("b", "was made with tokenizer"), ("c", "has bos True and eos False"), ("d", "is a validation dataset")]
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            run(tmp_path / "a", tmp_path / name, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = run(tmp_path / "a", tmp_path / "d", output=tmp_path / "out", split="validation")
    assert manifest.split == "validation"
    assert manifest.shards[0].name == "validation-000000.tar"


def test_bad_input_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", 0, 20)
    before = contents(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for output in (tmp_path / "a", tmp_path / "link"):
        with pytest.raises(UserError, match="is one of the datasets to read"):
            run(tmp_path / "a", output=output, overwrite=True)
    with pytest.raises(UserError, match="--record-tokens is 0"):
        run(tmp_path / "a", output=tmp_path / "out", record_tokens=0)
    with pytest.raises(UserError, match="not a finished dataset"):
        run(tmp_path / "none", output=tmp_path / "out")
    write_dataset(tmp_path / "empty", [], tokenizer=Tokenizer(tiny_tokenizer()))
    with pytest.raises(UserError, match="are empty"):
        run(tmp_path / "empty", output=tmp_path / "out")
    rewrite(tmp_path / "a", tokenizer=replace(read_manifest(tmp_path / "a").tokenizer, pad_id=-1))
    (tmp_path / "a" / TOKENIZER_FILE).write_bytes(b"another")
    with pytest.raises(UserError, match="is not the tokenizer that made"):
        run(tmp_path / "a", output=tmp_path / "out")
    changed = {name for name, digest in contents(tmp_path / "a").items() if before[name] != digest}
    assert changed == {MANIFEST_FILE, TOKENIZER_FILE}


def test_an_output_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a", 0, 20)
    (tmp_path / "file").write_bytes(b"")
    assert main(["reshard", str(tmp_path / "a"), "--output", str(tmp_path / "file/out")]) == 2
    assert "error: cannot write to" in capsys.readouterr().err
