"""Show what a dataset holds: counts, lengths of documents, decoded samples with their borders.

nextlat-data inspect data/validation --samples 2 --png lengths.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_tools.shard_report import describe
from nextlat_dist.data.places import open_place
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage import Storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError

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

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.bar(self.edges[:-1], self.counts, width=np.diff(self.edges), align="edge", edgecolor="white")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens in the document", ylabel="documents", title=title)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


def inspect(dataset: Path, *, samples: int, sample_tokens: int, png: Path | None) -> str:
    """The report as text; reads and so verifies every record.

    Raises:
        UserError: the dataset is missing or damaged.
    """
    place = open_place(dataset)
    manifest = read_manifest(place)
    storage = Storage(place, manifest)
    tokenizer = Tokenizer(dataset / manifest.tokenizer.file)
    if tokenizer.sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{dataset / manifest.tokenizer.file} is not the tokenizer that made {dataset}; copy the dataset again"
        )
    # Samples come from evenly spaced documents.
    wanted = set(np.linspace(0, manifest.documents - 1, min(samples, manifest.documents)).astype(int).tolist())
    lengths: list[np.ndarray] = []
    shown: list[str] = []
    number = 0
    for index in tqdm(range(len(storage)), desc="inspect", unit="record", file=sys.stderr, mininterval=0.5):
        record = storage.read(index)
        for document in sorted(n - number for n in wanted if number <= n < number + len(record.ends)):
            begin, end = int(record.ends[document] - record.lengths[document]), int(record.ends[document])
            masked = 0 if record.prompts is None else int(record.prompts[document])
            shown.append(
                f"── document {number + document}: {end - begin} tokens, {masked} of them prompt ──\n"
                + _marked(record.tokens[begin:end], masked, tokenizer, sample_tokens)
            )
        number += len(record.ends)
        lengths.append(record.lengths)
    all_lengths = np.concatenate(lengths)
    histogram = Histogram.of(all_lengths)
    if png is not None:
        histogram.png(png, f"{dataset.name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    quantiles = np.quantile(all_lengths, [0, 0.5, 0.9, 1], method="inverted_cdf").tolist()
    return "\n".join(
        [
            describe(manifest, dataset),
            f"  tokenizer {manifest.tokenizer.sha256[:12]}… with {manifest.tokenizer.vocab_size} ids, "
            f"bos {manifest.bos}, eos {manifest.eos}, prompts {manifest.has_prompts}",
            "  tokens per document: shortest {}, median {}, 90% {}, longest {}".format(*quantiles),
            histogram.text(),
            *shown,
        ]
    )


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
