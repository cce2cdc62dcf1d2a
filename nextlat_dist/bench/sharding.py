"""Tokens per second of `nextlat-data shard` with one worker, against sentencepiece alone.

The floor is one `SentencePieceProcessor.encode` per text, with the texts in memory: what no sharding can do without.
The command reads JSONL, checks that every text comes back, writes tars, indices and digests, and flushes them to disk.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from data_tools import cli
from data_tools.text.stdlib import Text, pages, read_stdlib
from nextlat_dist.bench.timing import alternate, cores, row
from nextlat_dist.data.shard_format import read_manifest

SHARD = "nextlat-data shard, 1 worker"
FLOOR = "sentencepiece alone"


def stdlib_texts(characters: int) -> list[str]:
    """Sources of the Python standard library in documents of a few pages, about this much text in all."""
    texts: list[str] = []
    for name, source in read_stdlib(Path(sysconfig.get_paths()["stdlib"])).items():
        texts += [page.text for page in pages(Text(name, "code", "train", source)) if page.text.strip()]
        if sum(map(len, texts)) >= characters:
            break
    return texts


def _command(arguments: Sequence[str]) -> None:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = cli.main(list(arguments))
    assert status == 0, output.getvalue()


def measure_sharding(
    directory: Path, texts: Sequence[str], tokenizer: Path, *, rounds: int, done: Callable[[str], None]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Summary and rows: the command and sentencepiece alternate on the same texts, in an empty `directory`."""
    directory.mkdir()
    source = directory / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    outputs = (directory / f"dataset-{number}" for number in itertools.count())
    options = ["--input", str(source), "--tokenizer", str(tokenizer), "--no-bos", "--no-eos", "--workers", "1"]

    def shard() -> int:
        output = next(outputs)
        _command(["shard", *options, "--output", str(output)])
        return read_manifest(output).tokens

    def encode() -> int:
        return sum(len(processor.encode(text)) for text in texts)

    with cores(1):
        rates = alternate({SHARD: shard, FLOOR: encode}, rounds, done)
    summary = {"shard_ratio_to_sentencepiece": rates[SHARD].ratio_to(rates[FLOOR])}
    return summary, [row(name, rates=value) for name, value in rates.items()]
