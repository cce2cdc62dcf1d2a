"""The documents of a source that are still to be encoded, each with its position in the input.

Invariant: documents that an interrupted run has in finished shards are passed over, and only if they are the same ones.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from data_tools.shards.journal import Mark
from data_tools.text.sources import TextDocument, TextSource
from nextlat_dist.errors import UserError


@dataclass(frozen=True)
class Passed:
    """A document that was handed out to be encoded: what of it is needed afterwards."""

    name: str
    split: str
    mark: Mark


class PendingDocuments:
    """Documents to encode, from a source and what is already done of it.

    Args:
        split_of: which dataset a document goes to.
        done: for each split, up to where its finished shards reach.

    Attributes:
        start: up to here every split is done: where the work continues.
        position: how far the source was read.
    """

    def __init__(self, source: TextSource, split_of: Callable[[TextDocument], str], done: Mapping[str, Mark]) -> None:
        self._source = source
        self._split_of = split_of
        self._done = done
        self._passed: deque[Passed] = deque()
        self.start = self.position = min(done.values(), key=lambda mark: mark.documents)

    def documents(self) -> Iterator[TextDocument]:
        """The documents that no finished shard holds.

        Raises:
            UserError: the input is not the one that the finished shards came from.
        """
        expected = {mark.documents: mark for mark in self._done.values() if mark.documents}
        part, before_part = self.start.part, self.start.before_part
        number, source_bytes, crc32 = before_part, self.start.source_bytes, 0
        for document in self._source.documents(part):
            if document.part != part:
                part, before_part, crc32 = document.part, number, 0
            number += 1
            crc32 = zlib.crc32(document.text, zlib.crc32(document.prompt or b"", crc32))
            if number > self.start.documents:
                source_bytes += document.source_bytes
            mark = self.position = Mark(part, before_part, number, source_bytes, crc32)
            if expected and (known := expected.pop(number, None)) and (known.part, known.crc32) != (part, crc32):
                raise _changed(number)
            split = self._split_of(document)
            if number > self._done[split].documents:
                self._passed.append(Passed(document.name, split, mark))
                yield document
        if expected:
            raise _changed(max(expected))

    def next_passed(self) -> Passed:
        """The first document handed out by `documents` that was not yet asked for here."""
        return self._passed.popleft()


def _changed(documents: int) -> UserError:
    return UserError(
        f"the first {documents:,} documents of the input are not those of the unfinished run in --output; give the "
        "same input again, or pass --overwrite to start again"
    )
