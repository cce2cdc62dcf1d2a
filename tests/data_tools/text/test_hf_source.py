from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.cli import main
from data_tools.text.hf_source import HfSource
from data_tools.text.sources import Fields
from nextlat_dist.errors import UserError
from tests.kit.corpora import stored
from tests.kit.datasets import tiny_tokenizer

PARTS = [
    [
        {"text": f"part {part} row {row} ▁ \n", "q": f"q{row}", "split": "train" if row % 3 else "validation", "n": row}
        for row in range(10)
    ]
    for part in range(3)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same rows as Parquet and as JSONL."""
    for number, rows in enumerate(PARTS):
        for kind in ("parquet", "json"):
            (tmp_path / kind).mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"parquet/{number}.parquet")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"json/{number}.jsonl").write_text(lines)
    return tmp_path


def source(name: object, *data_files: object, fields: Fields | None = None, split: str = "train") -> HfSource:
    return HfSource(
        str(name), fields or Fields(), config=None, split=split, data_files=[str(pattern) for pattern in data_files]
    )


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_every_data_file_is_a_part_and_every_row_a_document(folder: Path, kind: str) -> None:
    for opened in (source(kind, f"{folder}/{kind}/*"), source(folder / kind)):
        assert opened.parts == 3
        found = list(opened.documents())
        assert [document.text.decode() for document in found] == [row["text"] for rows in PARTS for row in rows]
        assert [document.name for document in found[9:11]] == [f"{kind}/0:10", f"{kind}/1:1"]
        assert [document.part for document in found] == [part for part in range(3) for _ in range(10)]
        assert list(opened.documents(2)) == found[20:]


def test_fields_are_read_as_from_files(folder: Path) -> None:
    fields = Fields(text="text", prompt="q", split="split")
    found = list(source("parquet", folder / "parquet/1.parquet", fields=fields).documents())
    assert [(d.prompt, d.split) for d in found] == [(row["q"].encode(), row["split"]) for row in PARTS[1]]
    assert [d.prompt for d in source(folder / "json").documents()] == [None] * 30


def test_the_identity_is_of_the_data_files(folder: Path) -> None:
    before = source(folder / "json").identity
    assert before == source(folder / "json").identity
    assert json.loads(json.dumps(before))
    assert before != source(folder / "json", "0.jsonl").identity
    path = folder / "json/2.jsonl"
    path.write_text(path.read_text() + json.dumps(PARTS[0][0]) + "\n")
    assert before != source(folder / "json").identity


@pytest.mark.parametrize(
    ("name", "data_files", "fields", "split", "message"),
    [
        ("no/such-dataset", [], Fields(), "train", "hf:no/such-dataset cannot be read .*network, then run the same"),
        ("{}/none", [], Fields(), "train", "none cannot be read"),
        ("pandas", ["{}/x.pkl"], Fields(), "train", "hf:pandas would unpickle its files, which runs code in them"),
        ("parquet", ["{}/none/*.parquet"], Fields(), "train", "hf:parquet cannot be read"),
        ("parquet", ["{}/json/0.jsonl"], Fields(), "train", "hf:parquet cannot be read"),
        ("{}/json", [], Fields(), "test", r"cannot be read \(Bad split: test"),
        ("{}/json", [], Fields(text="body"), "train", "has no column 'body', only text, q, split, n; name the columns"),
        ("{}/json", [], Fields(text="n"), "train", "column 'n' of hf:.* holds a int; it must be a string"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    folder: Path, name: str, data_files: Sequence[str], fields: Fields, split: str, message: str
) -> None:
    patterns = [pattern.format(folder) for pattern in data_files]
    with pytest.raises(UserError, match=message) as caught:
        list(source(name.format(folder), *patterns, fields=fields, split=split).documents())
    assert "\n" not in str(caught.value)


def test_the_command_shards_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shard", "--source", "hf:parquet", "--hf-data-files", f"{folder}/parquet/0.parquet"]
    arguments += [f"{folder}/parquet/2.parquet", "--tokenizer", str(tiny_tokenizer()), "--workers", "1", "--no-shuffle"]
    assert main([*arguments, "--output", str(folder / "out"), "--prompt-field", "q", "--split-field", "split"]) == 0
    assert "validation: 8 documents" in capsys.readouterr().out
    _, found = stored(folder / "out/train")
    assert found == [(row["q"], row["text"]) for row in PARTS[0] + PARTS[2] if row["split"] == "train"]
    for wrong in ("parquet", "hf:"):
        assert main(["shard", "--source", wrong, *arguments[3:], "--output", str(folder / "other")]) == 2
        assert "it must be hf:NAME" in capsys.readouterr().err


def test_without_the_package_it_says_what_to_install(tmp_path: Path) -> None:
    arguments = ["shard", "--source", "hf:x/y", "--tokenizer", str(tiny_tokenizer()), "--output", str(tmp_path)]
    code = f"import sys; sys.modules['datasets'] = None\nfrom data_tools.cli import main\nsys.exit(main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --source hf:x/y needs the `datasets` package; install it with pip install 'nextlat-dist[hf]'\n"
    )
