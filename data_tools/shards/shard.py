"""Turn documents into one dataset, or into a train and a validation one.

Invariant: identical input, tokenizer and options give identical bytes, whatever the number of workers and however often
the run was interrupted; every document that was left out or changed is counted in the manifest's report.

    nextlat-data shard --input corpus/ --tokenizer corpus/tokenizer.model --output data --validation-fraction 0.02
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import sentencepiece
from tqdm import tqdm

from data_tools.options import RECORD_TOKENS, SHARD_TOKENS
from data_tools.shards.encode import OnInvalid, Remark, encode_all
from data_tools.shards.journal import FinishedShard, Mark, ShardJournal, writing_to
from data_tools.shards.long_documents import TokenCollector
from data_tools.shards.pending import PendingDocuments
from data_tools.shards.shard_report import LEFT_OUT, LONG_TOKENS, MEANINGS, ShardReport
from data_tools.shards.shuffle import ShuffledWriter
from data_tools.shards.writer import DatasetWriter
from data_tools.text.sources import TextDocument, TextSource
from data_tools.text.splits import Split, split_of
from nextlat_dist.data.shard_format import FORMAT_VERSION, Manifest
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.files import sole_writer
from nextlat_dist.reporting.console import say

PROGRESS_BYTES = 1 << 18


@dataclass(frozen=True)
class ShardOptions:
    """What to write. With `validation_fraction` or `split_by_field` there are two datasets, OUTPUT/train and
    OUTPUT/validation; otherwise OUTPUT is one dataset named `split`. `shuffle_seed` mixes the documents (the command's
    default); None keeps their order."""

    tokenizer: Path
    output: Path
    split: Split = "train"
    validation_fraction: float | None = None
    split_by_field: bool = False
    has_prompts: bool = False
    bos: bool = True
    eos: bool = True
    on_invalid: OnInvalid = "replace"
    record_tokens: int = RECORD_TOKENS
    shard_tokens: int = SHARD_TOKENS
    workers: int = 1
    overwrite: bool = False
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError for values out of range."""
        fraction = self.validation_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise UserError(f"--validation-fraction is {fraction}; it must lie between 0 and 1")
        for name in ("record_tokens", "shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.shuffle_seed is not None and not 0 <= self.shuffle_seed < 1 << 63:
            raise UserError(f"--seed is {self.shuffle_seed}; it must be a number from 0 to 2**63 - 1")

    @property
    def settings(self) -> dict[str, Any]:
        """What of this and of the libraries decides the output, by the name that a message gives it."""
        named = ("split", "validation_fraction", "bos", "eos", "on_invalid", "record_tokens", "shard_tokens")
        shuffled = {} if self.shuffle_seed is None else {"--seed": self.shuffle_seed}
        return {
            **shuffled,
            "format version": FORMAT_VERSION,
            "sentencepiece": sentencepiece.__version__,
            **{f"--{name.replace('_', '-')}": getattr(self, name) for name in named},
        }

    @property
    def splits(self) -> dict[str, Path]:
        """Directory of each dataset to write."""
        if self.validation_fraction is None and not self.split_by_field:
            return {self.split: self.output}
        return {name: self.output / name for name in get_args(Split)}

    def split_of(self, document: TextDocument) -> str:
        """Raises UserError for a document whose split field names no split."""
        if document.fault is not None:  # it is counted with the first split
            return next(iter(self.splits))
        if self.split_by_field:
            if document.split is None or document.split not in get_args(Split):
                raise UserError(
                    f"{document.name} has the split {document.split!r}; the field named by --split-field must hold "
                    "'train' or 'validation'"
                )
            return document.split
        return self.split if self.validation_fraction is None else split_of(document.name, self.validation_fraction)


def shard(source: TextSource, options: ShardOptions) -> list[Manifest]:
    """Encode the documents of the source and write the dataset or datasets.

    An interrupted run with the same source and options is resumed; its finished shards are kept.

    Raises:
        UserError: an output exists or cannot be written, a document is refused, or a split would be empty.
    """
    tokenizer = Tokenizer(options.tokenizer)
    if options.shuffle_seed is not None:
        source = source.shuffled(options.shuffle_seed)
    settings = {**options.settings, "tokenizer (sha256)": tokenizer.sha256, **source.identity}
    writing = writing_to(options.output)
    with writing:
        options.output.mkdir(parents=True, exist_ok=True)
    with sole_writer(options.output):
        with writing:
            journal = ShardJournal(options.output, options.splits, settings, overwrite=options.overwrite)
        return _Run(source, options, tokenizer, journal).finish()


class _Run:
    """One run of `shard`."""

    def __init__(self, source: TextSource, options: ShardOptions, tokenizer: Tokenizer, journal: ShardJournal) -> None:
        self._source = source
        self._writing = writing_to(options.output)
        self._options = options
        self._journal = journal
        self._writers: dict[str, DatasetWriter] = {}
        self._shuffled: dict[str, ShuffledWriter] = {}
        self._reports: dict[str, ShardReport] = {}
        done: dict[str, Mark] = {}
        for name, directory in options.splits.items():
            kept = [shard for shard in journal.finished if shard.split == name]
            with self._writing:
                self._writers[name] = DatasetWriter(
                    directory,
                    name,
                    tokenizer,
                    record_tokens=options.record_tokens,
                    # A buffer of shuffled documents ends where a shard does, and says so.
                    shard_tokens=options.shard_tokens if options.shuffle_seed is None else sys.maxsize,
                    has_prompts=options.has_prompts,
                    bos=options.bos,
                    eos=options.eos,
                    overwrite=options.overwrite,
                    kept=[shard.entry for shard in kept],
                )
            self._shuffled[name] = ShuffledWriter(
                self._writers[name], shard_tokens=options.shard_tokens, seed=options.shuffle_seed
            )
            self._reports[name] = ShardReport(options.on_invalid, kept[-1].report if kept else None)
            done[name] = kept[-1].mark if kept else Mark()
        self._pending = PendingDocuments(source, options.split_of, done)
        if journal.finished:
            documents = sum(shard.entry.documents for shard in journal.finished)
            say(f"resuming: {len(journal.finished):,} shards kept, {documents:,} documents skipped", error=True)

    def finish(self) -> list[Manifest]:
        """Do what is left to do."""
        try:
            self._add_documents()
            with self._writing:
                for name, writer in self._writers.items():
                    before = len(writer.shards)
                    self._shuffled[name].flush()
                    if len(writer.shards) > before:
                        self._note_finished(name, self._pending.position)
            self._refuse_empty_splits()
            with self._writing:
                manifests = [writer.finish(self._reports[name].to_json()) for name, writer in self._writers.items()]
                self._journal.remove()
            return manifests
        except BaseException as error:
            for writer in self._writers.values():
                writer.abandon(error)
            raise

    def _add_documents(self) -> None:
        options = self._options
        encoding = encode_all(
            self._pending.documents(),
            options.tokenizer,
            bos=options.bos,
            eos=options.eos,
            on_invalid=options.on_invalid,
            workers=options.workers,
        )
        # Closing ends the workers at once, also when the error comes from this loop.
        with closing(encoding), _Progress(self._source, self._pending.start) as progress:
            collector, remarks, prompt_tokens, is_left_out = TokenCollector(options.output), set[Remark](), 0, False
            for encoded in encoding:
                document = self._pending.next_passed(ends=encoded.ends)
                if encoded.remark is not None:
                    remarks.add(encoded.remark)
                is_left_out = is_left_out or encoded.tokens is None
                if is_left_out:
                    collector.drop()
                elif encoded.tokens is not None:
                    with self._writing:
                        collector.add(encoded.tokens)
                    prompt_tokens += encoded.prompt_tokens
                    progress.tokens += len(encoded.tokens)
                progress.reach(document.mark)
                if not encoded.ends:
                    continue
                tokens = None if is_left_out else collector.take()
                if tokens is not None and len(tokens) > LONG_TOKENS:
                    remarks.add("long")
                for remark in MEANINGS:  # in a fixed order
                    if remark in remarks and (tokens is not None or remark in LEFT_OUT):
                        self._reports[document.split].add(remark, document.name)
                if tokens is not None:
                    with self._writing:
                        if self._shuffled[document.split].add(tokens, prompt_tokens):
                            self._note_finished(document.split, document.mark)
                remarks, prompt_tokens, is_left_out = set(), 0, False

    def _note_finished(self, split: str, mark: Mark) -> None:
        """Write to the journal that a shard of this split was finished with the document at `mark`."""
        shard = self._writers[split].shards[-1]
        self._journal.add(FinishedShard(split, shard, mark, self._reports[split].to_json()))

    def _refuse_empty_splits(self) -> None:
        documents = {name: sum(shard.documents for shard in writer.shards) for name, writer in self._writers.items()}
        empty = [name for name, count in documents.items() if not count]
        if len(empty) == len(documents):
            raise UserError("the input has no document with text; change --input, --glob or --field")
        if empty:
            raise UserError(
                f"no document falls into the {empty[0]} split ({sum(documents.values())} documents in all); give "
                "more input or change --validation-fraction or the split field"
            )


class _Progress:
    """A bar over the bytes of the source, with the rate of tokens.

    Attributes:
        tokens: of this run.
    """

    def __init__(self, source: TextSource, start: Mark) -> None:
        self.tokens = 0
        self._mark = start
        self._parts = source.parts
        self._total = source.total_bytes
        self._bar = tqdm(
            total=self._total,
            initial=start.source_bytes,
            unit="B",
            unit_scale=True,
            desc="shard",
            file=sys.stderr,
            mininterval=0.5,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._show()
        if kind is None:
            self._bar.total = self._bar.n
        self._bar.close()

    def reach(self, mark: Mark) -> None:
        """The document at `mark` is done."""
        self._mark = mark
        if mark.source_bytes - self._bar.n >= PROGRESS_BYTES:
            self._show()

    def _show(self) -> None:
        mark = self._mark
        if self._total is None and mark.part:
            self._bar.total = mark.source_bytes * self._parts // mark.part  # as if parts were of one size
        rate = self.tokens / max(self._bar.format_dict["elapsed"], 1e-3)
        self._bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
        self._bar.update(mark.source_bytes - self._bar.n)
