"""`nextlat-data verify`: everything that can be wrong with a dataset, all of it listed.

    nextlat-data verify data/train s3://bucket/data/validation --json report.json

One pass checks the manifest's digest, the tokenizer's hash, every index, the size and sha256 of every shard, the crc32,
counts and token ids of every record, and whether plain webdataset finds as many records in the tar.

Invariant: a problem never hides another one: what can still be checked is checked. Exit status 0 when all is well, 1
when there are problems, 2 when there is no dataset to verify.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_tools.tars.adopt import left_out
from data_tools.tars.tar_reader import DAMAGED, TarDamage, TarReader
from nextlat_dist.data.members import Decoder, read_tokenizer, record_decoder, split_members
from nextlat_dist.data.shard_format import INDEX_COLUMNS, MANIFEST_FILE, Manifest, ShardEntry, read_index, read_manifest
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError, without_secrets
from nextlat_dist.files import write_whole
from nextlat_dist.reporting.console import say


class _Unreadable(Exception):
    """Plain webdataset cannot read a shard to its end."""


@dataclass(frozen=True)
class Problem:
    """`shard` and `record` (number in its shard) are None where the problem is not theirs."""

    problem: str
    shard: str | None = None
    record: int | None = None

    def __str__(self) -> str:
        where = f"shard {self.shard}: " if self.shard else ""
        return where + (f"record {self.record}: " if self.record is not None else "") + self.problem


@dataclass
class Verified:
    """What was found in one dataset. The counts are those of the manifest, None where it cannot be trusted."""

    dataset: str
    problems: list[Problem] = field(default_factory=list)
    shards: int | None = None
    records: int | None = None
    documents: int | None = None
    tokens: int | None = None
    bytes: int | None = None


def verify(dataset: str) -> Verified:
    """Check all of a dataset, given by its path or URL.

    Raises:
        UserError: there is no dataset.
    """
    storage = open_storage(dataset)
    result = Verified(without_secrets(dataset))
    try:
        manifest = read_manifest(storage)
    except UserError as error:
        if storage.sizes([MANIFEST_FILE]) == [None]:
            raise
        result.problems.append(Problem(str(error)))
        return result
    result.shards, result.records = len(manifest.shards), manifest.records
    result.documents, result.tokens = manifest.documents, manifest.tokens
    result.bytes = sum(shard.bytes for shard in manifest.shards)
    problem, decode = _tokenizer(storage, manifest)
    result.problems += problem
    uncounted = left_out(manifest)
    sizes = storage.sizes([shard.name for shard in manifest.shards])
    total = sum(size or 0 for size in sizes)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", file=sys.stderr, mininterval=0.5) as bar:
        for shard, size in zip(manifest.shards, sizes, strict=True):
            if size is None:
                result.problems.append(Problem("it is missing", shard.name))
                continue
            check = _ShardCheck(storage, shard, decode, manifest.tokenizer.vocab_size)
            check.run(size, shard.records + uncounted.get(shard.name, 0), bar.update)
            result.problems += check.problems
    return result


def _tokenizer(storage: Storage, manifest: Manifest) -> tuple[list[Problem], Decoder | None]:
    """Problems of the tokenizer, and what decodes records; None where that needs a tokenizer and there is none."""
    model: bytes | None = None
    problems: list[Problem] = []
    try:
        model = read_tokenizer(storage, manifest)
    except UserError as error:
        problems.append(Problem(str(error)))
    if model is None and manifest.members.kind == "text":
        return problems, None
    return problems, record_decoder(manifest, model)


class _ShardCheck:
    """Collects the problems of one shard; `decode` None leaves the content of records unchecked."""

    def __init__(self, storage: Storage, shard: ShardEntry, decode: Decoder | None, vocab_size: int) -> None:
        self._storage, self._shard, self._decode, self._vocab_size = storage, shard, decode, vocab_size
        self.problems: list[Problem] = []

    def run(self, size: int, plain_records: int, moved: Callable[[int], object]) -> None:
        """Read all `size` bytes; plain webdataset should find `plain_records`."""
        shard = self._shard
        if size != shard.bytes:
            self._add(f"it has {size} bytes where the manifest says {shard.bytes}")
        table = self._index()
        reader = TarReader(self._storage, shard.name, size, moved)
        try:
            self._check_records(reader, table, plain_records)
            if reader.finish() != shard.sha256:
                self._add("its sha256 is not that of the manifest")
        except (OSError, TarDamage) as error:
            self._add(f"it cannot be read ({error})")

    def _index(self) -> np.ndarray:
        """int64 [records, 5]; no rows when the index cannot be used."""
        try:
            table = read_index(self._storage, self._shard)
        except UserError as error:
            self._add(str(error))
            return np.empty((0, len(INDEX_COLUMNS)), np.int64)
        documents, tokens = table[:, 2].sum(), table[:, 3].sum()
        if (documents, tokens) != (self._shard.documents, self._shard.tokens):
            self._add(
                f"its index counts {documents} documents and {tokens} tokens, the manifest "
                f"{self._shard.documents} and {self._shard.tokens}"
            )
        return table

    def _check_records(self, reader: TarReader, table: np.ndarray, plain_records: int) -> None:
        """Check each record when a plain webdataset reader has gone past it, so that one pass serves both."""
        waiting = deque(self._in_order(table))
        found = 0
        try:
            for _ in _plain_reader(reader):
                found += 1
                while waiting and waiting[0][1][0] + waiting[0][1][1] <= reader.position:
                    self._check_record(reader, *waiting.popleft())
                reader.release(waiting[0][1][0] if waiting else reader.position)
            if found != plain_records:
                self._add(f"plain webdataset finds {found} records in it, not {plain_records}")
        except _Unreadable as error:
            self._add(f"plain webdataset cannot read it to its end ({error}); it finds {found} records")
        for number, row in waiting:
            reader.position = max(reader.position, row[0])
            reader.release(row[0])
            self._check_record(reader, number, row)

    def _in_order(self, table: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Records as they lie in the shard; an index that somebody made may have others, which one pass cannot read."""
        end = 0
        for number, row in enumerate(table.tolist()):
            if row[0] < end:
                self._add(f"its index has it begin at byte {row[0]}, before {end}, the end of those before it", number)
            else:
                end = row[0] + row[1]
                yield number, row

    def _check_record(self, reader: TarReader, number: int, row: list[int]) -> None:
        offset, length, documents, tokens, crc32 = row
        data = reader.span(offset, offset + length)
        if len(data) != length or zlib.crc32(data) != crc32:
            self._add(f"its bytes at offset {offset} are not those that were written: the crc32 differs", number)
            return
        if self._decode is None:
            return
        try:
            record = self._decode(split_members(data))
        except ValueError as error:
            self._add(f"it is not what the manifest says: {error}", number)
            return
        if (len(record.ends), len(record.tokens)) != (documents, tokens):
            self._add(
                f"it holds {len(record.ends)} documents and {len(record.tokens)} tokens, its index says {documents} "
                f"and {tokens}",
                number,
            )
        largest = int(record.tokens.max())
        if largest >= self._vocab_size:
            self._add(f"it holds token id {largest}, but the vocabulary has {self._vocab_size} ids", number)

    def _add(self, problem: str, record: int | None = None) -> None:
        self.problems.append(Problem(problem, self._shard.name, record))


def _plain_reader(reader: TarReader) -> Iterator[dict[str, Any]]:
    """The samples that `webdataset.WebDataset(shard)` makes, by the functions that it is made of.

    Raises:
        _Unreadable: they find damage.
        TarDamage, OSError: the reader does.
    """
    # Imported here because the package imports torch where torch is installed.
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    try:
        yield from group_by_keys({**file, "__url__": ""} for file in tar_file_iterator(reader))
    except TarDamage:
        raise
    except DAMAGED as error:
        raise _Unreadable(str(error)) from error


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("verify", help="check every byte of datasets and list all problems")
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="directories or URLs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found (default: nowhere)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    results = [verify(dataset) for dataset in options.datasets]
    problems = 0
    for result in results:
        for problem in result.problems:
            say(f"{result.dataset}: {problem}")
        problems += len(result.problems)
        if result.shards is not None and result.bytes is not None:
            counts = f"{result.shards:,} shards, {result.records:,} records, {result.documents:,} documents, "
            counts += f"{result.tokens:,} tokens, {result.bytes / 1e6:,.1f} MB"
            say(f"{result.dataset}: {counts}: {len(result.problems) or 'no'} problems")
    say(f"{problems} problems" if problems else "everything is as it was written")
    if options.json is not None:
        report = {"clean": not problems, "datasets": [asdict(result) for result in results]}
        write_whole(options.json, (json.dumps(report, indent=1) + "\n").encode())
    return 1 if problems else 0
