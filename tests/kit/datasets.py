"""Small datasets for the tests, with token ids that say where they came from."""

from __future__ import annotations

import argparse
import atexit
import inspect
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from data_tools.shards.writer import DatasetWriter
from data_tools.text.tokenizer import train_tokenizer
from nextlat_dist.data.shard_format import Manifest
from nextlat_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class FakeTokenizer:
    """Enough of a tokenizer for `DatasetWriter`; nothing is ever encoded with it."""

    model: bytes = b"no real model"
    sha256: str = "5ha"
    vocab_size: int = 60000
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 3


def write_dataset(
    directory: Path,
    documents: Sequence[np.ndarray],
    *,
    prompts: Sequence[int] | None = None,
    labels: Sequence[np.ndarray] | None = None,
    record_tokens: int = 64,
    shard_tokens: int = 512,
    tokenizer: Any = None,
) -> Manifest:
    """A dataset of the given token documents, each with its labels where some are given."""
    writer = DatasetWriter(
        directory,
        "train",
        cast(Tokenizer, tokenizer or FakeTokenizer()),
        record_tokens=record_tokens,
        shard_tokens=shard_tokens,
        has_prompts=prompts is not None,
        bos=True,
        eos=True,
        overwrite=False,
    )
    for number, document in enumerate(documents):
        extra = {"labels": labels[number].astype(np.uint16)} if labels is not None else None
        writer.add(document.astype(np.uint16), prompts[number] if prompts is not None else 0, extra)
    writer.flush()
    return writer.finish({})


def numbered_documents(lengths: Sequence[int]) -> list[np.ndarray]:
    """Documents of these lengths whose tokens are 10, 11, 12… throughout, so that every token is unique."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end) + 10 for length, end in zip(lengths, ends, strict=True)]


@cache
def tiny_tokenizer() -> Path:
    """A trained tokenizer of 600 ids, one for the whole test run."""
    directory = Path(tempfile.mkdtemp(prefix="nextlat-test-tokenizer-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = directory / "tokenizer.model"
    train_tokenizer([inspect.getsource(argparse), "1234 " * 500], path, vocab_size=600)
    return path
