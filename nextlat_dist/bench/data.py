"""Speed of the data path: loading, resuming, sharding.

    python -m nextlat_dist.bench.data [--json FILE] [--quick]

`tokens_per_second_per_core`      shuffled `concat` rows of 1024 + 1 tokens with document ids and loss masks, one core
`tokens_per_cpu_second`           the same per second that the machine gave to this process
`ratio_to_webdataset`             tokens/s over those of plain `webdataset` streaming one document per record
`resume_seconds`                  opening a dataset of two billion tokens at sample 10,000,000 and reading that batch
`shard_ratio_to_sentencepiece`    `nextlat-data shard` with one worker over sentencepiece alone

Everything is written to a temporary directory first and is read from the page cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.text.tokenizer import train_tokenizer
from nextlat_dist.bench.loading import measure_loading, random_documents, settings, write_blocks, write_documents
from nextlat_dist.bench.resuming import measure_resuming, multiply
from nextlat_dist.bench.sharding import measure_sharding, stdlib_texts
from nextlat_dist.bench.timing import COLUMNS, with_summary
from nextlat_dist.reporting.publish import run_benchmark
from nextlat_dist.reporting.report import Report

COMMAND = "python -m nextlat_dist.bench.data"


@dataclass(frozen=True)
class DataSizes:
    """How much is measured.

    Attributes:
        dataset_tokens: of the dataset that the loader reads; `round_tokens` of it count in a round.
        resume_shard_tokens, resume_tokens: of a shard, and of all, of the dataset that is resumed at row
            `resume_sample`.
        text_characters: to shard.
    """

    rounds: int = 5
    vocab_size: int = 4096
    dataset_tokens: int = 1 << 24
    round_tokens: int = 1 << 24
    resume_shard_tokens: int = 1 << 26
    resume_tokens: int = 2_000_000_000
    resume_sample: int = 10_000_000
    text_characters: int = 6_000_000


QUICK = DataSizes(
    rounds=2,
    vocab_size=600,
    dataset_tokens=1 << 20,
    round_tokens=1 << 20,
    resume_shard_tokens=1 << 20,
    resume_tokens=1 << 24,
    resume_sample=100_000,
    text_characters=300_000,
)


def bench_data(sizes: DataSizes, directory: Path) -> Report:
    """Writes what it measures on below `directory`."""
    trials = (sizes.rounds + 1) * (len(settings()) + 3) + 2 * sizes.rounds
    with tqdm(total=trials + 2, desc="bench data", file=sys.stderr, unit="trial") as bar:

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        texts = stdlib_texts(sizes.text_characters)
        tokenizer = train_tokenizer(texts, directory / "tokenizer.model", sizes.vocab_size)
        documents = random_documents(sizes.dataset_tokens, tokenizer.vocab_size)
        write_blocks(directory / "blocks", documents, tokenizer, sizes.dataset_tokens // 4)
        write_documents(directory / "documents", documents)
        done("dataset written")
        long = random_documents(sizes.resume_shard_tokens, tokenizer.vocab_size)
        write_blocks(directory / "long", long, tokenizer, sizes.resume_shard_tokens)
        multiply(directory / "long", sizes.resume_tokens)
        done("long dataset written")
        parts = [
            measure_loading(
                directory / "blocks",
                directory / "documents",
                rounds=sizes.rounds,
                round_tokens=sizes.round_tokens,
                done=done,
            ),
            measure_resuming(directory / "long", sizes.resume_sample, rounds=sizes.rounds, done=done),
            measure_sharding(
                directory / "sharding", texts, directory / "tokenizer.model", rounds=sizes.rounds, done=done
            ),
        ]
    summary = {name: value for part, _ in parts for name, value in part.items()}
    rows = [row for _, part in parts for row in part]
    return Report(COMMAND, asdict(sizes), summary, rows, text=with_summary(COLUMNS, rows, summary))


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(COMMAND, "How fast data is loaded, resumed and sharded.", _measure, arguments)


def _measure(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(prefix="nextlat-bench-") as directory:
        # What was verified of temporary files is not worth remembering.
        os.environ["NEXTLAT_CACHE"] = str(Path(directory) / "cache")
        return bench_data(QUICK if options.quick else DataSizes(), Path(directory))


if __name__ == "__main__":
    sys.exit(main())
