"""The journal of an unfinished `nextlat-data shard`: which shards are finished, and how far into the input they reach.

Invariant: a line is written only when its shard and index are on disk, and is itself on disk before the next shard is
begun; so a run that is killed at any moment is continued from its last line. There is no journal without a finished
shard, and none beside a dataset that is finished. Its first line holds the settings that decide the output: a run with
others cannot go on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.files import write_file
from nextlat_dist.data.shard_format import ShardEntry, index_name
from nextlat_dist.errors import UserError

JOURNAL_FILE = ".shard-journal.jsonl"


@dataclass(frozen=True)
class Mark:
    """A place in the input, after a document.

    Attributes:
        part: of the source in which that document is.
        before_part: documents in the parts before.
        documents: documents so far, in all parts.
        source_bytes: bytes of input so far.
        crc32: of the texts of this part so far.
    """

    part: int = 0
    before_part: int = 0
    documents: int = 0
    source_bytes: int = 0
    crc32: int = 0


@dataclass(frozen=True)
class FinishedShard:
    """A shard that holds the documents of its split up to `mark`, those of its earlier shards excepted.

    Attributes:
        report: state of the split's report there.
    """

    split: str
    entry: ShardEntry
    mark: Mark
    report: dict[str, Any]


class Journal:
    """The journal in `output`, opened for a run with these settings.

    Args:
        directories: of each split.
        settings: everything that decides the output, by the name that a message gives it.
        overwrite: drop the journal of another run.

    Attributes:
        finished: shards that need not be written again, in the order in which they were finished.

    Raises:
        UserError: the unfinished run in `output` had other settings.
    """

    def __init__(
        self, output: Path, directories: Mapping[str, Path], settings: Mapping[str, Any], *, overwrite: bool
    ) -> None:
        self._path = output / JOURNAL_FILE
        self._settings = json.loads(json.dumps(settings))
        self.finished: list[FinishedShard] = []
        lines = self._read()
        if not lines:
            return
        different = [name for name in {**lines[0], **self._settings} if lines[0].get(name) != self._settings.get(name)]
        if different and not overwrite:
            raise UserError(
                f"{output} holds an unfinished run with {_difference(different[0], lines[0], self._settings)}; repeat "
                "that command to finish it, or pass --overwrite to start again"
            )
        if not different:
            for line in lines[1:]:
                shard = _finished_shard(line)
                if not _is_there(directories[shard.split], shard.entry):
                    break
                self.finished.append(shard)
        self._rewrite()

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines: what a killed run left of its last one does not count."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for line in data.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def _rewrite(self) -> None:
        if self.finished:
            lines = [self._settings, *map(asdict, self.finished)]
            write_file(self._path, b"".join(map(_line, lines)))
        else:
            self._path.unlink(missing_ok=True)

    def add(self, shard: FinishedShard) -> None:
        """Make it durable that this shard is finished."""
        self.finished.append(shard)
        if len(self.finished) == 1:
            self._rewrite()
            return
        with self._path.open("ab") as file:
            file.write(_line(asdict(shard)))
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """The datasets are finished."""
        self._path.unlink(missing_ok=True)


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _finished_shard(line: Mapping[str, Any]) -> FinishedShard:
    return FinishedShard(line["split"], ShardEntry(**line["entry"]), Mark(**line["mark"]), line["report"])


def _is_there(directory: Path, shard: ShardEntry) -> bool:
    """Whether a finished shard still has its size and its index."""
    path = directory / shard.name
    try:
        index = path.with_name(index_name(shard.name)).read_bytes()
        return path.stat().st_size == shard.bytes and hashlib.sha256(index).hexdigest() == shard.index_sha256
    except OSError:
        return False


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before.get(name), now.get(name)
    if isinstance(old, str | int | float | None) and isinstance(new, str | int | float | None):
        return f"{name} {old}, not {new}"
    return f"other {name} (names, sizes or times differ)"
