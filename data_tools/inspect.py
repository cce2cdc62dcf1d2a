"""`nextlat-data inspect`: counts, lengths of documents, decoded samples with their borders.

nextlat-data inspect data/validation --samples 2 --png lengths.png --json report.json

Invariant: every record is read, and so verified, once.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.shards.shard_report import describe
from nextlat_dist.data.members import load_tokenizer, read_tokenizer
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, Record, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError, without_secrets
from nextlat_dist.files import write_whole
from nextlat_dist.reporting.console import say

BAR_WIDTH = 50


@dataclass(frozen=True)
class Histogram:
    """Documents by length: bin i holds lengths in [edges[i], edges[i + 1]), edges are powers of two."""

    edges: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray) -> Histogram:
        """`lengths`: int64 [documents], each at least 1."""
        exponents = np.floor(np.log2(lengths)).astype(np.int64)
        first, last = int(exponents.min()), int(exponents.max())
        return cls(2 ** np.arange(first, last + 2), np.bincount(exponents - first, minlength=last - first + 1))

    def text(self) -> str:
        widest = self.counts.max()
        return "\n".join(
            f"{low:>9,} – {high - 1:<9,} {count:>9,} {'█' * int(np.ceil(BAR_WIDTH * count / widest))}"
            for low, high, count in zip(self.edges[:-1], self.edges[1:], self.counts, strict=True)
        )

    def png(self, path: Path, title: str) -> None:
        from matplotlib.figure import Figure

        from nextlat_dist.reporting.pictures import save_picture

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(self.edges[:-1], self.counts, width=np.diff(self.edges), align="edge", edgecolor="white")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens in the document", ylabel="documents", title=title)
        save_picture(figure, path)


@dataclass(frozen=True)
class Sample:
    """One document of a dataset: its number, its tokens, how many of them are prompt, and the text with ⟦marks⟧."""

    document: int
    tokens: int
    prompt_tokens: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """What a dataset holds. `lengths`: int64 [documents], tokens of each document."""

    dataset: str
    manifest: Manifest
    lengths: np.ndarray
    samples: list[Sample]

    @property
    def histogram(self) -> Histogram:
        return Histogram.of(self.lengths)

    @property
    def quantiles(self) -> dict[str, int]:
        found = np.quantile(self.lengths, [0, 0.5, 0.9, 1], method="inverted_cdf").tolist()
        return dict(zip(("shortest", "median", "90%", "longest"), found, strict=True))

    def png(self, path: Path) -> None:
        name = self.dataset.rstrip("/").rpartition("/")[2]
        self.histogram.png(path, f"{name}: {self.manifest.documents:,} documents, {self.manifest.tokens:,} tokens")

    def text(self) -> str:
        manifest, entry = self.manifest, self.manifest.members
        member = "" if entry.kind == "block" else f", adopted {entry.kind} of .{entry.member} members"
        shown = [
            f"── document {sample.document}: {sample.tokens} tokens, {sample.prompt_tokens} of them prompt ──\n"
            + sample.text
            for sample in self.samples
        ]
        return "\n".join(
            [
                describe(manifest, self.dataset),
                f"  tokenizer {manifest.tokenizer.sha256[:12]}… with {manifest.tokenizer.vocab_size} ids, "
                f"bos {manifest.bos}, eos {manifest.eos}, prompts {manifest.has_prompts}{member}",
                f"  tokens per document: {', '.join(f'{name} {value}' for name, value in self.quantiles.items())}",
                self.histogram.text(),
                *shown,
            ]
        )

    def to_json(self) -> dict[str, Any]:
        manifest, histogram = self.manifest, self.histogram
        return {
            "dataset": self.dataset,
            "split": manifest.split,
            "shards": len(manifest.shards),
            "records": manifest.records,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "has_prompts": manifest.has_prompts,
            "bos": manifest.bos,
            "eos": manifest.eos,
            "tokenizer": asdict(manifest.tokenizer),
            "members": asdict(manifest.members),
            "report": manifest.report,
            "tokens_per_document": self.quantiles,
            "histogram": {"edges": histogram.edges.tolist(), "documents": histogram.counts.tolist()},
            "samples": [asdict(sample) for sample in self.samples],
        }


def inspect(dataset: str, *, samples: int, sample_tokens: int) -> Inspection:
    """Read all of a dataset, given by its path or URL; `samples` documents at even distances are decoded.

    Raises:
        UserError: the dataset is missing, damaged or empty.
    """
    storage = open_storage(dataset)
    manifest = read_manifest(storage)
    # Every record is read, and so its crc32 checked, below.
    records = Records(storage, manifest, verify="never")
    tokenizer = load_tokenizer(read_tokenizer(storage, manifest))
    if not manifest.documents:
        raise UserError(f"dataset {dataset} is empty; there is nothing to inspect")
    wanted = set(np.linspace(0, manifest.documents - 1, min(samples, manifest.documents)).astype(int).tolist())
    lengths: list[np.ndarray] = []
    shown: list[Sample] = []
    number = 0
    for index in tqdm(range(len(records)), desc="inspect", unit="record", file=sys.stderr, mininterval=0.5):
        record = records.read(index)
        for document in sorted(n for n in wanted if number <= n < number + len(record.ends)):
            shown.append(_sample(record, document - number, document, tokenizer, sample_tokens))
        number += len(record.ends)
        lengths.append(record.lengths)
    return Inspection(without_secrets(dataset), manifest, np.concatenate(lengths), shown)


def _sample(record: Record, number: int, document: int, tokenizer: Tokenizer, limit: int) -> Sample:
    begin, end = int(record.ends[number] - record.lengths[number]), int(record.ends[number])
    masked = 0 if record.prompts is None else int(record.prompts[number])
    return Sample(document, end - begin, masked, _marked(record.tokens[begin:end], masked, tokenizer, limit))


def _marked(tokens: np.ndarray, masked: int, tokenizer: Tokenizer, limit: int) -> str:
    """Text with ⟦marks⟧ for BOS, EOS, the end of the prompt and what is not shown."""
    ids = tokens.tolist()
    begin, end = ids[:1] == [tokenizer.bos_id], ids[-1:] == [tokenizer.eos_id]
    body = ids[begin : len(ids) - end]
    prompt = max(masked - begin, 0)
    half = limit // 2
    parts = ["⟦bos⟧" if begin else ""]
    if prompt:
        parts += [tokenizer.decode(body[:prompt]), "⟦end of prompt⟧"]
    rest = body[prompt:]
    if len(rest) > limit:
        cut = f"⟦{len(rest) - 2 * half} tokens⟧"
        parts += [tokenizer.decode(rest[:half]), cut, tokenizer.decode(rest[len(rest) - half :])]
    else:
        parts.append(tokenizer.decode(rest))
    return "".join([*parts, "⟦eos⟧" if end else ""])


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("inspect", help="counts, document lengths and decoded samples of a dataset")
    parser.add_argument("dataset", help="directory or URL")
    parser.add_argument("--samples", type=int, default=3, help="documents to show (default: %(default)s)")
    parser.add_argument(
        "--sample-tokens", type=int, default=200, help="show no more of a sample (default: %(default)s)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the histogram of lengths (default: nowhere)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed (default: nowhere)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    for name in ("samples", "sample_tokens"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must not be negative")
    inspection = inspect(options.dataset, samples=options.samples, sample_tokens=options.sample_tokens)
    say(inspection.text())
    if options.png is not None:
        inspection.png(options.png)
    if options.json is not None:
        write_whole(options.json, (json.dumps(inspection.to_json(), indent=1) + "\n").encode())
