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


@dataclass
class Passed:
    """A document that was handed out to be encoded: what of it is needed afterwards.

    Attributes:
        mark: up to where of it was handed out; of a document that was encoded to its end, its end.
    """

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
            number += document.begins
            crc32 = zlib.crc32(document.text, zlib.crc32(document.prompt or b"", crc32))
            if number > self.start.documents:
                source_bytes += document.source_bytes
            mark = self.position = Mark(part, before_part, number, source_bytes, crc32)
            known = expected.pop(number, None) if document.ends else None
            if known is not None and (known.part, known.crc32) != (part, crc32):
                raise _changed(number)
            split = self._split_of(document)
            if number > self._done[split].documents:
                if document.begins:
                    handed_out = Passed(document.name, split, mark)
                    self._passed.append(handed_out)
                handed_out.mark = mark
                yield document
        if expected:
            raise _changed(max(expected))

    def next_passed(self, *, ends: bool) -> Passed:
        """The first document handed out by `documents` that was not yet asked for here to its end."""
        return self._passed.popleft() if ends else self._passed[0]


def _changed(documents: int) -> UserError:
    return UserError(
        f"the first {documents:,} documents of the input are not those of the unfinished run in --output; give the "
        "same input again, or pass --overwrite to start again"
    )
