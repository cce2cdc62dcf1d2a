"""Bytes in, bytes out: through the real `shard` to `Storage.read` and back, whatever the text is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.shards.shard import ShardOptions, shard
from data_tools.shards.shard_report import REPORTED_NAMES
from data_tools.text.find import find_files
from data_tools.text.formats import other_format, utf_encoding, without_bom
from data_tools.text.json_lines import Fields
from data_tools.text.sources import FileSource
from nextlat_dist.data.tokenizer import Tokenizer
from tests.kit.corpora import stored
from tests.kit.datasets import tiny_tokenizer

NASTY = [
    "\x00",
    "▁",
    "\ufeff",
    "\r\n",
    "\r",
    "\u2028\x85\x0c",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x41>",
    "<0xE2><0x96><0x81>",
    " ⁇ ",
    "\ufffd",
    "   ",
    "\t",
    "e\u0301",
    "\U0010ffff\ufffe",
    "👩‍👩‍👧",
    "0123456789",
    "def f(x):\n        return",
]
SURROGATES = ["\ud800", "\udfff", "\ud83d\ude00", "\udcc3\udca9", "\udc80", "\udce2\udc96\udc81"]

valid_text = st.lists(st.sampled_from(NASTY) | st.text(st.characters(codec="utf-8"), max_size=8), max_size=6).map(
    "".join
)
any_text = st.lists(st.sampled_from(NASTY + SURROGATES) | st.text(st.characters(), max_size=8), max_size=6).map("".join)


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write(path: Path, rows: list[dict[str, str]], ascii_only: bool) -> list[tuple[str, str]]:
    """Write JSONL and return prompt and text of each line as a JSON parser sees them."""
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
    parsed = [json.loads(line) for line in lines]
    return [(row.get("prompt", ""), row["text"]) for row in parsed]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(any_text, any_text), min_size=1, max_size=8), st.booleans(), st.booleans())
@example([("", "\udcc3\udca9")], True, False)
@example([("", "only " + " " * 3000), ("p", "x" * 20000), ("", "▁" * 500)], True, True)
@example([("a ", " b"), ("▁", "▁"), ("\udcc3", "\udca9")], True, True)
def test_every_json_document_comes_back_or_is_reported(
    documents: list[tuple[str, str]], ascii_only: bool, with_prompts: bool
) -> None:
    """At most as many documents as the report names, so that it can be held against each of them."""
    assert len(documents) <= REPORTED_NAMES
    rows = [{"prompt": p, "text": t} if with_prompts else {"text": t} for p, t in documents]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        parsed = write(folder / "data.jsonl", [*rows, {"prompt": "", "text": "the last one"}], ascii_only)
        source = FileSource(find_files([str(folder / "data.jsonl")]), Fields(prompt="prompt" if with_prompts else None))
        shard(source, ShardOptions(tiny_tokenizer(), folder / "out", record_tokens=50, has_prompts=with_prompts))
        manifest, found = stored(folder / "out")
    report: dict[str, Any] = manifest.report
    names = {name for kind in ("empty", "invalid_utf8", "not_lossless", "binary") for name in report[kind]["names"]}
    expected_changed = {f"data.jsonl:{n}" for n, pair in enumerate(parsed, 1) if not is_unicode("".join(pair))}
    expected_empty = {f"data.jsonl:{n}" for n, pair in enumerate(parsed, 1) if not any(pair)}
    assert set(report["invalid_utf8"]["names"]) == expected_changed
    assert set(report["empty"]["names"]) == expected_empty
    assert names == expected_changed | expected_empty
    kept = [pair for pair in parsed if any(pair)]
    assert len(found) == len(kept)
    for (prompt, text), (given_prompt, given_text) in zip(found, kept, strict=True):
        if is_unicode(given_prompt + given_text):
            assert (prompt, text) == (given_prompt, given_text)


def is_text(content: str | bytes) -> bool:
    """What is neither refused by its first bytes nor empty without a byte order mark."""
    raw = content.encode() if isinstance(content, str) else content
    return utf_encoding(raw) is None and other_format(raw) is None and without_bom(raw) != b""


@settings(max_examples=30, deadline=None)
@given(st.lists((valid_text.filter(bool) | st.binary(min_size=1, max_size=20)).filter(is_text), min_size=1, max_size=8))
@example(["\ufefftext\r\n", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"cut \xe2\x96"])
def test_every_file_and_parquet_row_comes_back_or_is_reported(contents: list[str | bytes]) -> None:
    raw = [content.encode() if isinstance(content, str) else content for content in contents]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        inputs = []
        for number, content in enumerate(raw):
            inputs.append(folder / f"{number}.txt")
            inputs[-1].write_bytes(content)
        # Binary that says it is text: Parquet does not look into strings.
        column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "rows.parquet")
        source = FileSource(find_files([*map(str, inputs), str(folder / "rows.parquet")]))
        shard(source, ShardOptions(tiny_tokenizer(), folder / "out"))
        manifest, found = stored(folder / "out")
    # A file loses its byte order mark, and nothing else.
    expected_texts = [*map(without_bom, raw), *raw]
    assert [text for _, text in found] == [content.decode(errors="replace") for content in expected_texts]
    invalid = [n for n, content in enumerate(raw) if content.decode(errors="ignore").encode() != content]
    expected = [f"{n}.txt" for n in invalid] + [f"rows.parquet:{n + 1}" for n in invalid]
    assert manifest.report["invalid_utf8"]["names"] == expected
    assert manifest.report["not_lossless"]["count"] == manifest.report["empty"]["count"] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(any_text.filter(is_unicode), min_size=1, max_size=5))
@example(["▁", " ", ""])
@example(["a", "", "a"])
def test_the_quick_check_says_what_the_decoder_says(texts: list[str]) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    parts = tokenizer.encode_all(texts)
    ids, ends = np.concatenate(parts), np.cumsum([len(part) for part in parts]).tolist()
    assert tokenizer.given_back(ids, ends, texts) == [True] * len(texts)
    others = [text + "x" for text in texts]
    assert tokenizer.given_back(ids, ends, others) == [False] * len(texts)
    shifted = [min(end + 1, len(ids)) for end in ends]
    decoded = [tokenizer.decode(part) for part in np.split(ids, shifted)[:-1]]
    said = tokenizer.given_back(ids, shifted, texts)
    assert said == [one == other for one, other in zip(decoded, texts, strict=True)]


@pytest.mark.parametrize("unit", ["a", " ", "▁", "\n", "漢", "👩", "\x00"])
def test_a_very_long_line_of_one_character_comes_back(unit: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    text = unit * 200_000
    assert tokenizer.decode(tokenizer.encode_array(text)) == text
