"""Tokens per second out of the loader, after packing and document masks, and out of plain `webdataset`.

Both read the same documents from a warm page cache on one core. Ours are blocks of documents, shuffled, packed
into rows with document ids and loss masks; `webdataset` streams one `.npy` member per document in file order, which is
what it does fastest, and packs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_tools.shards.writer import DatasetWriter
from nextlat_dist.bench.timing import Rates, alternate, cores, row
from nextlat_dist.data.loader import Cursor, RowLoader
from nextlat_dist.data.tokenizer import Tokenizer

RECORD_TOKENS = 32768
MEAN_DOCUMENT_TOKENS = 1000
SIGMA = 1.0  # of the logarithm of a document's length: the longest of ten thousand is about 40 times the median
BATCH_TOKENS = 1 << 16
ROUND_TOKENS = 1 << 24
WEBDATASET = "webdataset, one document per record"


def random_documents(tokens: int, vocab_size: int) -> list[np.ndarray]:
    """Documents with lognormal lengths, uint16 [length] each, of `tokens` random ids in total."""
    generator = np.random.default_rng(0)
    mean = np.log(MEAN_DOCUMENT_TOKENS) - SIGMA**2 / 2
    lengths: list[int] = []
    left = tokens
    while left:
        lengths.append(min(left, max(1, round(generator.lognormal(mean, SIGMA)))))
        left -= lengths[-1]
    ids = generator.integers(4, vocab_size, tokens, np.uint16)
    return np.split(ids, np.cumsum(lengths)[:-1])


def write_blocks(directory: Path, documents: Sequence[np.ndarray], tokenizer: Tokenizer, shard_tokens: int) -> None:
    """The documents as one of our datasets."""
    writer = DatasetWriter(
        directory,
        "train",
        tokenizer,
        record_tokens=RECORD_TOKENS,
        shard_tokens=shard_tokens,
        has_prompts=False,
        bos=False,
        eos=False,
        overwrite=False,
    )
    for document in documents:
        writer.add(document, 0)
    writer.flush()
    writer.finish({})


def write_documents(directory: Path, documents: Sequence[np.ndarray]) -> None:
    """The documents as `webdataset` itself writes them, one record each."""
    from webdataset.writer import ShardWriter

    directory.mkdir(parents=True)
    with ShardWriter(str(directory / "plain-%06d.tar"), maxcount=10_000, verbose=0) as writer:
        for number, document in enumerate(documents):
            writer.write({"__key__": f"{number:09d}", "npy": document})


@dataclass(frozen=True)
class Setting:
    """One way to read the blocks."""

    packing: Literal["concat", "pad"]
    sequence_length: int
    workers: int = 0
    cores: int = 1

    @property
    def name(self) -> str:
        return f"{self.packing}, sequence length {self.sequence_length}, workers {self.workers}, cores {self.cores}"


HEADLINE = Setting("concat", 1024)
SETTINGS = (
    HEADLINE,
    Setting("concat", 256),
    Setting("concat", 4096),
    Setting("concat", 8192),
    Setting("pad", 1024),
    Setting("concat", 1024, workers=1),
    Setting("concat", 1024, workers=1, cores=2),
    Setting("concat", 1024, workers=2, cores=2),
)


def settings() -> list[Setting]:
    """Those that there are enough cores for."""
    return [setting for setting in SETTINGS if setting.cores <= len(os.sched_getaffinity(0))]


def open_loader(dataset: Path, setting: Setting, *, global_batch_size: int, row: int = 0) -> RowLoader:
    return RowLoader(
        dataset,
        sequence_length=setting.sequence_length,
        packing=setting.packing,
        global_batch_size=global_batch_size,
        seed=0,
        shuffle=True,
        data_parallel_rank=0,
        data_parallel_size=1,
        cursor=Cursor(row),
        workers=setting.workers,
    )


def reader(loader: RowLoader, setting: Setting, batches: int) -> Callable[[], int]:
    """Reads on by so many batches with each call; returns how many tokens of documents these were."""

    def read() -> int:
        taken = 0
        for _ in range(batches):
            batch = loader.next_batch()
            taken += batch.tokens.size if setting.packing == "concat" else int((batch.document_ids >= 0).sum())
        return taken

    return read


def webdataset_reader(directory: Path) -> Callable[[], int]:
    """Streams everything once; returns how many tokens that were."""
    import webdataset

    shards = sorted(str(path) for path in directory.glob("*.tar"))

    def read() -> int:
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode()
        return sum(len(sample["npy"]) for sample in samples)

    return read


def measure_loading(
    blocks: Path, documents: Path, *, rounds: int, round_tokens: int, done: Callable[[str], None]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Summary and rows: all settings on `blocks` and plain `webdataset` on `documents` alternate."""
    rates: dict[str, Rates] = {}
    for count in sorted({setting.cores for setting in settings()}):
        with cores(count), ExitStack() as stack:
            methods: dict[str, Callable[[], int]] = {}
            for setting in settings():
                if setting.cores == count:
                    rows = BATCH_TOKENS // setting.sequence_length
                    loader = stack.enter_context(closing(open_loader(blocks, setting, global_batch_size=rows)))
                    batches = round_tokens // (rows * (setting.sequence_length + 1))
                    methods[setting.name] = reader(loader, setting, batches)
            if count == HEADLINE.cores:
                methods[WEBDATASET] = webdataset_reader(documents)
            rates |= alternate(methods, rounds, done)
    summary = {
        "tokens_per_second_per_core": rates[HEADLINE.name].median,
        "tokens_per_cpu_second": rates[HEADLINE.name].cpu_median,
        "ratio_to_webdataset": rates[HEADLINE.name].ratio_to(rates[WEBDATASET]),
    }
    return summary, [row(name, rates=value) for name, value in rates.items()]
