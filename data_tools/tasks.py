"""Draw the documents of a task and write them as a train and a test dataset.

Invariant: no content of the test set is in the training set (asserted over hashes of 16 bytes) and no document is twice
in a set; the same task, seed and counts give the same bytes, and a larger training set begins with the documents of a
smaller one.

    nextlat-data task path-star --arms 2 --length 5 --nodes 50 --output data/star --train 100_000 --test 1000
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from data_tools.shards.journal import writing_to
from data_tools.shards.shard import ShardOptions
from data_tools.shards.writer import DatasetWriter
from data_tools.task_tokenizer import task_tokenizer
from nextlat_dist.data.shard_format import Manifest, token_dtype
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import sole_writer
from nextlat_dist.tasks import BOS_ID, EOS_ID, Document, Split, Task

# So many documents in a row that are not new end the search: at that point all but one in a thousand are known.
LARGEST_REPEAT = 10_000


@dataclass(frozen=True)
class TaskOptions:
    """What to write: OUTPUT/train with `train` documents and OUTPUT/test with `test`."""

    output: Path
    train: int
    test: int
    seed: int = 0
    record_tokens: int = ShardOptions.record_tokens
    shard_tokens: int = ShardOptions.shard_tokens
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        for name in ("train", "test", "record_tokens", "shard_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must not be negative")


class _Drawn:
    """Draws the documents of one split; `contents` and `documents` are hashes of what was drawn so far."""

    def __init__(self, task: Task, split: Split, seed: int) -> None:
        self._task, self._split = task, split
        self._rng = np.random.default_rng([seed, get_args(Split).index(split)])
        self.contents: set[bytes] = set()
        self._documents: set[bytes] = set()

    def documents(self, count: int, excluded: set[bytes]) -> Iterator[Document]:
        """`count` different documents with no content of `excluded`.

        Raises:
            UserError: the task has not so many.
        """
        repeats = 0
        while len(self._documents) < count:
            document = self._task.sample(self._rng, self._split)
            content, whole = _hash(document.content), _hash(document.tokens.tobytes())
            if content in excluded or whole in self._documents:
                repeats += 1
                if repeats == LARGEST_REPEAT:
                    raise UserError(
                        f"{self._task.name} with {self._task.parameters} gave {len(self._documents)} different "
                        f"documents for the {self._split} set, then {repeats} in a row that it or the other set has "
                        f"already; lower --train and --test, or make the task larger"
                    )
                continue
            repeats = 0
            self.contents.add(content)
            self._documents.add(whole)
            yield document


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


def write_task(task: Task, options: TaskOptions) -> dict[Split, Manifest]:
    """Draw the documents and write both datasets, the test set first: its problems are drawn from the whole world.

    Raises:
        UserError: the task has too few documents, or an output exists or cannot be written.
    """
    tokenizer = task_tokenizer(task)
    counts: dict[Split, int] = {"test": options.test, "train": options.train}
    writing = writing_to(options.output)
    with writing:
        options.output.mkdir(parents=True, exist_ok=True)
    with sole_writer(options.output), writing:
        writers = {split: _writer(task, split, tokenizer, options) for split in counts}
        try:
            held_out: set[bytes] = set()
            for split, count in counts.items():
                drawn = _Drawn(task, split, options.seed)
                _add(writers[split], drawn.documents(count, held_out), count, token_dtype(tokenizer.vocab_size))
                assert drawn.contents.isdisjoint(held_out), "train and test share a problem"
                held_out = drawn.contents
            report = {"task": {"name": task.name, "parameters": task.parameters, "seed": options.seed}}
            return {split: writer.finish(report) for split, writer in writers.items()}
        except BaseException as error:
            for writer in writers.values():
                writer.abandon(error)
            raise


def _writer(task: Task, split: Split, tokenizer: Tokenizer, options: TaskOptions) -> DatasetWriter:
    example = task.sample(np.random.default_rng(options.seed), split)
    return DatasetWriter(
        options.output / split,
        split,
        tokenizer,
        record_tokens=options.record_tokens,
        shard_tokens=options.shard_tokens,
        has_prompts=True,
        bos=True,
        eos=bool(example.tokens[-1] == EOS_ID),
        overwrite=options.overwrite,
    )


def _add(writer: DatasetWriter, documents: Iterable[Document], count: int, dtype: np.dtype[Any]) -> None:
    for document in tqdm(documents, desc=writer.split, total=count, unit="doc", file=sys.stderr, mininterval=0.5):
        assert document.tokens[0] == BOS_ID, "a document without BOS"
        extra = {}
        if document.labels is not None:
            extra["labels"] = document.labels.astype(dtype)
        if document.beliefs is not None:
            extra["beliefs"] = document.beliefs.astype(np.float32)
        writer.add(document.tokens.astype(dtype), document.prompt_tokens, extra)
    writer.flush()
