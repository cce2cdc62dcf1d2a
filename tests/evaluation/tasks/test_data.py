"""Documents read back are those that were written, with their labels and beliefs."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from data_tools.shards.writer import DatasetWriter
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.data import documents
from tests.kit.datasets import FakeTokenizer, numbered_documents, write_dataset

TASK = {"name": "state-tracking", "parameters": {"length": 2, "group": "S3"}, "seed": 0}
LENGTHS = [5, 3, 4, 6, 2, 7]  # with record_tokens=8: two documents a record


def write(directory: Path, *, labels: bool, beliefs: bool) -> None:
    writer = DatasetWriter(
        directory,
        "test",
        cast(Tokenizer, FakeTokenizer()),
        record_tokens=8,
        shard_tokens=16,
        has_prompts=True,
        bos=True,
        eos=True,
        overwrite=False,
    )
    for number, tokens in enumerate(numbered_documents(LENGTHS)):
        extra = {}
        if labels:
            extra["labels"] = (tokens + 100).astype(np.uint16)
        if beliefs:
            extra["beliefs"] = np.stack([tokens / 64, 1 - tokens / 64], axis=1).astype(np.float32)
        writer.add(tokens.astype(np.uint16), 1 + number % 2, extra)
    writer.flush()
    writer.finish({"task": TASK})


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("beliefs", [False, True])
def test_documents_are_those_written(tmp_path: Path, labels: bool, beliefs: bool) -> None:
    write(tmp_path, labels=labels, beliefs=beliefs)
    found = list(documents(tmp_path, None))
    for number, (document, tokens) in enumerate(zip(found, numbered_documents(LENGTHS), strict=True)):
        assert document.tokens.dtype == np.int64
        np.testing.assert_array_equal(document.tokens, tokens)
        assert document.prompt_tokens == 1 + number % 2
        if labels:
            np.testing.assert_array_equal(document.labels, tokens + 100)
        else:
            assert document.labels is None
        if beliefs:
            np.testing.assert_array_equal(document.beliefs, np.stack([tokens / 64, 1 - tokens / 64], axis=1))
        else:
            assert document.beliefs is None


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 100])
def test_a_limit_takes_the_first_ones(tmp_path: Path, limit: int) -> None:
    write(tmp_path, labels=True, beliefs=True)
    found = list(documents(tmp_path, limit))
    assert [len(document.tokens) for document in found] == LENGTHS[:limit]


def test_a_limit_below_one_is_refused(tmp_path: Path) -> None:
    write(tmp_path, labels=False, beliefs=False)
    with pytest.raises(UserError, match="documents is 0"):
        next(documents(tmp_path, 0))


def test_a_dataset_of_text_is_no_task(tmp_path: Path) -> None:
    write_dataset(tmp_path, numbered_documents(LENGTHS))
    with pytest.raises(UserError, match="not a task"):
        next(documents(tmp_path, None))


def test_a_damaged_belief_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, labels=False, beliefs=True)
    shard = next(tmp_path.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[content.index(b"<f4") + 200] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|sha256"):
        list(documents(tmp_path, None))
