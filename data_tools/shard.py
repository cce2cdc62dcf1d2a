"""Turn documents into one dataset, or into a train and a validation one.

Invariant: identical input, tokenizer and options give identical bytes, whatever the number of workers; every document
that was left out or changed is counted in the manifest's report.

    nextlat-data shard --input corpus/ --tokenizer corpus/tokenizer.model --output data --validation-fraction 0.02
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from data_tools.encode import Encoded, OnInvalid, encode_all
from data_tools.sources import Document
from data_tools.splits import Split, split_of
from data_tools.writer import DatasetWriter
from nextlat_dist.data.shard_format import Manifest
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError

REPORTED_NAMES = 20
REMARKS = {
    "empty": "empty documents left out",
    "binary": "binary files left out",
    "invalid_utf8": "documents that are not UTF-8",
    "not_lossless": "documents whose text does not come back from their tokens",
}


@dataclass(frozen=True)
class ShardOptions:
    """What to write. With `validation_fraction` or `split_by_field` there are two datasets, OUTPUT/train and
    OUTPUT/validation; otherwise OUTPUT is one dataset named `split`."""

    tokenizer: Path
    output: Path
    split: Split = "train"
    validation_fraction: float | None = None
    split_by_field: bool = False
    has_prompts: bool = False
    bos: bool = True
    eos: bool = True
    on_invalid: OnInvalid = "replace"
    record_tokens: int = 32768
    shard_tokens: int = 1 << 26
    workers: int = 1
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        fraction = self.validation_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"--validation-fraction is {fraction}; it must lie between 0 and 1")
        for name in ("record_tokens", "shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")

    @property
    def splits(self) -> dict[str, Path]:
        """Directory of each dataset to write."""
        if self.validation_fraction is None and not self.split_by_field:
            return {self.split: self.output}
        return {name: self.output / name for name in get_args(Split)}

    def split_of(self, document: Document) -> str:
        """Raises UserError for a document whose split field names no split."""
        if self.split_by_field:
            if document.split is None or document.split not in get_args(Split):
                raise UserError(
                    f"{document.name} has the split {document.split!r}; the field named by --split-field must hold "
                    "'train' or 'validation'"
                )
            return document.split
        return self.split if self.validation_fraction is None else split_of(document.name, self.validation_fraction)


class _Report:
    """Counts and first names of the documents of one split that were left out or changed."""

    def __init__(self, on_invalid: OnInvalid) -> None:
        self._on_invalid = on_invalid
        self._names: dict[str, list[str]] = {remark: [] for remark in REMARKS}

    def add(self, encoded: Encoded) -> None:
        if encoded.remark is not None:
            self._names[encoded.remark].append(encoded.document.name)

    def to_json(self) -> dict[str, Any]:
        lists = {key: {"count": len(names), "names": names[:REPORTED_NAMES]} for key, names in self._names.items()}
        return {"on_invalid": self._on_invalid, **lists}


def shard(documents: Iterable[Document], options: ShardOptions, *, total_bytes: int | None = None) -> list[Manifest]:
    """Encode the documents and write the dataset or datasets; `total_bytes` of input is for the progress bar only.

    Raises:
        UserError: an output exists, a document is refused, or a split would be empty.
    """
    tokenizer = Tokenizer(options.tokenizer)
    writers: dict[str, DatasetWriter] = {}
    reports = {name: _Report(options.on_invalid) for name in options.splits}
    try:
        for name, directory in options.splits.items():
            writers[name] = DatasetWriter(
                directory,
                name,
                tokenizer,
                record_tokens=options.record_tokens,
                shard_tokens=options.shard_tokens,
                has_prompts=options.has_prompts,
                bos=options.bos,
                eos=options.eos,
                overwrite=options.overwrite,
            )
        encoding = encode_all(
            documents,
            options.tokenizer,
            bos=options.bos,
            eos=options.eos,
            on_invalid=options.on_invalid,
            workers=options.workers,
        )
        # Closing ends the workers at once, also when the error comes from this loop.
        with closing(encoding):
            for encoded in _with_progress(encoding, total_bytes):
                name = options.split_of(encoded.document)
                reports[name].add(encoded)
                if encoded.tokens is not None:
                    writers[name].add(encoded.tokens, encoded.prompt_tokens)
        documents_of = {name: writer.flush() for name, writer in writers.items()}
        empty = [name for name, count in documents_of.items() if not count]
        if len(empty) == len(writers):
            raise UserError("the input has no document with text; change --input, --glob or --field")
        if empty:
            raise UserError(
                f"no document falls into the {empty[0]} split ({sum(documents_of.values())} documents in all); give "
                "more input or change --validation-fraction or the split field"
            )
        return [writer.finish(reports[name].to_json()) for name, writer in writers.items()]
    except BaseException as error:
        for writer in writers.values():
            writer.abandon(error)
        raise


def _with_progress(encoded_documents: Iterator[Encoded], total_bytes: int | None) -> Iterator[Encoded]:
    tokens = 0
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="shard", file=sys.stderr, mininterval=0.5) as bar:
        for encoded in encoded_documents:
            tokens += 0 if encoded.tokens is None else len(encoded.tokens)
            bar.update(encoded.document.source_bytes)
            elapsed = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / max(elapsed, 1e-3) / 1e6:.2f}M tokens/s", refresh=False)
            yield encoded


def describe(manifest: Manifest, directory: Path) -> str:
    """One line on the dataset, one for each kind of document that was left out or changed."""
    lines = [
        f"{directory}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {manifest.records:,} records, "
        f"{len(manifest.shards):,} shards"
    ]
    for remark, meaning in REMARKS.items():
        found = manifest.report[remark]
        if found["count"]:
            policy = f" ({manifest.report['on_invalid']})" if remark == "invalid_utf8" else ""
            more = ", …" if found["count"] > len(found["names"]) else ""
            lines.append(f"  {found['count']} {meaning}{policy}: {', '.join(found['names'])}{more}")
    return "\n".join(lines)
