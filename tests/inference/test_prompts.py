"""Prompt files: order, domains, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.inference.prompts import Prompt, load_prompts


def test_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    records = [{"name": "a", "prompt": "def f(\u2028x"}, {"prompt": "class "}, {"name": "c", "prompt": "x"}]
    (folder / "code.jsonl").write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
    (folder / "art.txt").write_text("line one\nline two\n")
    (folder / "notes.md").write_text("not a prompt")
    single = tmp_path / "single.txt"
    single.write_text("alone")
    assert load_prompts([single, folder], per_domain=2) == [
        Prompt("single", "single", "alone"),
        Prompt("art", "art", "line one\nline two\n"),
        Prompt("code", "a", "def f(\u2028x"),
        Prompt("code", "3", "class "),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "line 2"),
        ("a.jsonl", '{"text": "x"}\n', "line 1"),
        ("a.jsonl", '["x"]\n', "line 1"),
        ("a.jsonl", '{"prompt": ""}\n', "line 1"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1"),
        ("a.jsonl", "\n", "holds no prompt"),
        ("a.txt", " \n", "holds no prompt"),
        ("a.csv", "x", "is not a prompt file"),
    ],
)
def test_refused_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts([tmp_path / name], per_domain=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt holds the byte 0xe9 in line 1, which is not UTF-8"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n', "a.jsonl holds the byte 0xe9 in line 2"),
        ("a.jsonl", b'{"prompt": "half \\ud83d"}\n', "line 1 of .*a.jsonl holds half a character"),
        ("a.txt", "\ufeffwide".encode("utf-16-le"), "a.txt is UTF-16, but must be UTF-8"),
        ("a.jsonl", b'{"prompt": ' + b"[" * 100_000, "line 1"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_prompts([tmp_path / name], per_domain=2)


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfimport")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "import"}\n')
    assert [prompt.text for prompt in load_prompts([tmp_path], per_domain=1)] == ["import", "import"]


def test_refused_requests(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a prompt file"):
        load_prompts([tmp_path / "missing.jsonl"], per_domain=1)
    with pytest.raises(UserError, match="holds no"):
        load_prompts([tmp_path], per_domain=1)
    with pytest.raises(UserError, match="no prompt file was given"):
        load_prompts([], per_domain=1)
    with pytest.raises(UserError, match="change prompts_per_domain"):
        load_prompts([tmp_path], per_domain=0)
