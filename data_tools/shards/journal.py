"""The journal of an unfinished run: what is finished and, for shards, how far into the input they reach.

Invariant: a line is written only when what it names is on disk, and is itself on disk before the next thing is begun;
so a run that is killed at any moment is continued from its last line. There is no journal without something finished,
and none next to a dataset that is finished. Its first line holds the settings that decide the output: a run with others
cannot continue it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.data.shard_format import ShardEntry, index_name
from nextlat_dist.errors import UserError
from nextlat_dist.files import append_durably, write_whole

JOURNAL_FILE = ".shard-journal.jsonl"


class writing_to:
    """Around code that only writes below `directory`: a full disk and the like end with a sentence. Can be used again.

    Raises:
        UserError: the system refused to write.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write to {self._directory} ({error.strerror or error}); make room there or correct that, then "
                "run the same command again: shards that are finished stay valid and are not done again"
            ) from error


@dataclass(frozen=True)
class Mark:
    """A position in the input, after a document.

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
    """A file of JSON lines: the settings of an unfinished run, then one line for each thing that it finished.

    Args:
        settings: everything that decides the output.

    Attributes:
        settings: as JSON gives them back.
        before: the lines that an earlier run left, its settings first; those after the first broken one, which a kill
            cut short, do not count.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self._begun = False
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.before = self._read()

    def _read(self) -> list[dict[str, Any]]:
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

    def keep(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Start with these entries, which need not be done again; without any there is no file yet."""
        self._begun = bool(entries)
        if entries:
            write_whole(self._path, b"".join(map(_line, [self.settings, *entries])))
        else:
            self.remove()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Make it durable that this is finished too."""
        if self._begun:
            append_durably(self._path, _line(entry))
        else:
            self.keep([entry])

    def remove(self) -> None:
        """The run is finished."""
        self._path.unlink(missing_ok=True)


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


class ShardJournal:
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
        self._journal = Journal(output / JOURNAL_FILE, settings)
        self.finished: list[FinishedShard] = []
        if not self._journal.before:
            return
        old, *lines = self._journal.before
        new = self._journal.settings
        different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if different and not overwrite:
            raise UserError(
                f"{output} holds an unfinished run with {_difference(different[0], old, new)}; repeat "
                "that command to finish it, or pass --overwrite to start again"
            )
        if not different:
            for line in lines:
                shard = _finished_shard(line)
                if not _is_there(directories[shard.split], shard.entry):
                    break
                self.finished.append(shard)
        self._journal.keep([asdict(shard) for shard in self.finished])

    def add(self, shard: FinishedShard) -> None:
        """Make it durable that this shard is finished."""
        self.finished.append(shard)
        self._journal.add(asdict(shard))

    def remove(self) -> None:
        """The datasets are finished."""
        self._journal.remove()


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
