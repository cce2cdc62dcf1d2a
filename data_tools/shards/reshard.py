"""One dataset of several, with records and shards of other sizes.

    nextlat-data reshard adopted/ data/books --output data/all --record-tokens 32768 --shard-tokens 67108864

The sources may be local or remote, adopted tars of text or tokens too; they must have been made with the same tokenizer
and the same settings of BOS and EOS. An interrupted run resumes after its last finished
shard.

Invariant: every document comes over with its tokens and its prompt, in the order of the sources; the manifest is
written last.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.shards.journal import FinishedShard, Mark, ShardJournal, writing_to
from data_tools.shards.shard import ShardOptions
from data_tools.shards.shard_report import ALWAYS, MEANINGS, merged
from data_tools.shards.writer import DatasetWriter
from nextlat_dist.data.members import load_tokenizer, read_tokenizer
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import FORMAT_VERSION, Manifest, Record, read_manifest, token_dtype
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import sole_writer
from nextlat_dist.reporting.console import say


@dataclass(frozen=True)
class ReshardOptions:
    """What to write; `split` None takes that of the sources."""

    output: Path
    record_tokens: int = ShardOptions.record_tokens
    shard_tokens: int = ShardOptions.shard_tokens
    split: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        for name in ("record_tokens", "shard_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")


class _Sources:
    """Datasets as one sequence of documents.

    Raises:
        UserError: one is missing or damaged, or they do not go together.
    """

    def __init__(self, urls: Sequence[str], split: str | None) -> None:
        storages = [open_storage(url) for url in urls]
        self.manifests = [read_manifest(storage) for storage in storages]
        first = self.manifests[0]
        for url, manifest in zip(urls, self.manifests, strict=True):
            if manifest.tokenizer.sha256 != first.tokenizer.sha256:
                raise UserError(
                    f"{url} was made with tokenizer {manifest.tokenizer.sha256[:12]}…, {urls[0]} with "
                    f"{first.tokenizer.sha256[:12]}…; shard one of them again from its text"
                )
            if (manifest.bos, manifest.eos) != (first.bos, first.eos):
                raise UserError(
                    f"{url} has bos {manifest.bos} and eos {manifest.eos}, {urls[0]} has bos {first.bos} and eos "
                    f"{first.eos}; shard one of them again with the settings of the other"
                )
            if "task" in manifest.report:
                raise UserError(
                    f"{url} is the dataset of a task, whose labels and beliefs would be lost; write it again by "
                    "`nextlat-data task` with other --record-tokens and --shard-tokens, the same --seed"
                )
            if split is None and manifest.split != first.split:
                raise UserError(
                    f"{url} is a {manifest.split} dataset, {urls[0]} a {first.split} one; name the result with --split"
                )
        self.split = split or first.split
        self.tokenizer: Tokenizer = load_tokenizer(read_tokenizer(storages[0], first))
        # Every record is read, and so its crc32 checked, below.
        self._records = [
            Records(storage, manifest, verify="never")
            for storage, manifest in zip(storages, self.manifests, strict=True)
        ]

    def documents(self, skipped: int) -> Iterator[tuple[np.ndarray, int]]:
        """Tokens [tokens] in the stored type and prompt length of each document but the first `skipped` ones.

        Raises:
            UserError: a record is damaged or has a token id outside the vocabulary.
        """
        for records in self._records:
            ends = np.cumsum(records.documents)
            start = int(np.searchsorted(ends, skipped, side="right"))
            for number in range(start, len(records)):
                record = records.read(number)
                done = max(skipped - int(ends[number] - records.documents[number]), 0)
                yield from self._split(record, records.describe(number), done)
            skipped = max(skipped - int(records.documents.sum()), 0)

    def _split(self, record: Record, described: str, done: int) -> Iterator[tuple[np.ndarray, int]]:
        vocab_size = self.tokenizer.vocab_size
        if record.tokens.max() >= vocab_size:
            raise UserError(
                f"{described} holds token id {record.tokens.max()}, but the vocabulary has {vocab_size} ids; shard it "
                "again"
            )
        parts = np.split(record.tokens.astype(token_dtype(vocab_size), copy=False), record.ends[:-1])
        prompts = [0] * len(parts) if record.prompts is None else record.prompts.tolist()
        yield from zip(parts[done:], prompts[done:], strict=True)

    def report(self) -> dict[str, Any]:
        """The reports of the sources, whole and added up."""
        reports = [manifest.report for manifest in self.manifests]
        nothing: dict[str, Any] = {"count": 0, "names": []}
        policies = sorted({report.get("on_invalid", "fail") for report in reports})
        return {
            "on_invalid": ", ".join(policies),
            **{
                remark: merged([report.get(remark, nothing) for report in reports])
                for remark in MEANINGS
                if remark in ALWAYS or any(remark in report for report in reports)
            },
            "resharded": [
                {"digest": m.digest, "documents": m.documents, "tokens": m.tokens, "report": m.report}
                for m in self.manifests
            ],
        }


def reshard(sources: Sequence[str], options: ReshardOptions) -> Manifest:
    """Write the documents of the sources, paths or URLs of datasets, into one new dataset.

    Raises:
        UserError: the sources do not go together or cannot be read, or the output is one of them, exists or cannot be
            written.
    """
    for source in sources:
        if "://" not in source and Path(source).resolve() == options.output.resolve():
            raise UserError(f"--output {options.output} is one of the datasets to read; choose another one")
    opened = _Sources(sources, options.split)
    settings = {
        "format version": FORMAT_VERSION,
        "--split": opened.split,
        "--record-tokens": options.record_tokens,
        "--shard-tokens": options.shard_tokens,
        "sources": [manifest.digest for manifest in opened.manifests],
    }
    with writing_to(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    with sole_writer(options.output):
        with writing_to(options.output):
            directories = {opened.split: options.output}
            journal = ShardJournal(options.output, directories, settings, overwrite=options.overwrite)
        return _write(opened, options, journal)


def _write(sources: _Sources, options: ReshardOptions, journal: ShardJournal) -> Manifest:
    first = sources.manifests[0]
    with writing_to(options.output):
        writer = DatasetWriter(
            options.output,
            sources.split,
            sources.tokenizer,
            record_tokens=options.record_tokens,
            shard_tokens=options.shard_tokens,
            has_prompts=any(manifest.has_prompts for manifest in sources.manifests),
            bos=first.bos,
            eos=first.eos,
            overwrite=options.overwrite,
            kept=[shard.entry for shard in journal.finished],
        )
    skipped = sum(shard.documents for shard in writer.shards)
    if skipped:
        say(f"resuming: {len(writer.shards):,} shards kept, {skipped:,} documents skipped", error=True)

    def note_finished(documents: int) -> None:
        if len(writer.shards) > len(journal.finished):
            journal.add(FinishedShard(sources.split, writer.shards[-1], Mark(documents=documents), {}))

    total = sum(manifest.tokens for manifest in sources.manifests)
    try:
        with tqdm(
            total=total,
            initial=sum(shard.tokens for shard in writer.shards),
            unit=" tokens",
            unit_scale=True,
            desc="reshard",
            file=sys.stderr,
            mininterval=0.5,
        ) as bar:
            for number, (tokens, prompt_tokens) in enumerate(sources.documents(skipped), skipped + 1):
                with writing_to(options.output):
                    writer.add(tokens, prompt_tokens)
                    note_finished(number)
                bar.update(len(tokens))
        with writing_to(options.output):
            documents = writer.flush()
            note_finished(documents)
        if not documents:
            raise UserError("the datasets to read are empty; there is nothing to write")
        with writing_to(options.output):
            manifest = writer.finish(sources.report())
            journal.remove()
    except BaseException as error:
        writer.abandon(error)
        raise
    assert manifest.documents == sum(source.documents for source in sources.manifests)
    assert manifest.tokens == total
    return manifest
