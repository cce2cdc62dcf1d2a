"""Cut long documents into pieces that are tokenised one by one, so that memory does not grow with a document.

Invariant: the tokens are those of the whole document wherever `SafeCuts` finds a cut; a stretch of `UNCUT_BYTES`
without one is cut at its end, and the document is named in the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from data_tools.text.safe_cuts import SafeCuts
from data_tools.text.sources import PIECE_BYTES, TextDocument, whole_characters

# sentencepiece takes about 50 bytes of memory for every byte that it is given at once.
UNCUT_BYTES = 4 * PIECE_BYTES


def in_pieces(documents: Iterable[TextDocument], model: bytes) -> Iterator[TextDocument]:
    """The documents, long ones in pieces that end at safe cuts. `model` is the content of the tokenizer's file."""
    cutter: _Cutter | None = None
    cuts: SafeCuts | None = None
    for document in documents:
        if document.begins and document.ends and len(document.text) <= PIECE_BYTES:
            yield document
            continue
        cuts = cuts or SafeCuts(model)  # reading the model takes a while, and most sources have no long document
        if document.begins:
            cutter = _Cutter(document, cuts)
        assert cutter is not None
        yield from cutter.add(document)


class _Cutter:
    """One long document on its way."""

    def __init__(self, document: TextDocument, cuts: SafeCuts) -> None:
        self._cuts = cuts
        self._held = b""
        self._searched = 1
        self._source_bytes = 0
        self._begins = True
        self._prompt = document.prompt

    def add(self, document: TextDocument) -> Iterator[TextDocument]:
        """Take the next part of the document as it was read; give what can be cut off."""
        text, counted = document.text, 0
        for at in range(0, len(text), PIECE_BYTES) or [0]:
            part = text[at : at + PIECE_BYTES]
            self._held += part
            read = document.source_bytes * (at + len(part)) // max(len(text), 1)
            self._source_bytes, counted = self._source_bytes + read - counted, read
            is_last = at + PIECE_BYTES >= len(text)
            if document.ends and is_last:
                yield self._piece(document, self._held, ends=True)
            else:
                yield from self._cut(document)

    def _cut(self, document: TextDocument) -> Iterator[TextDocument]:
        if len(self._held) < PIECE_BYTES:
            return
        found = self._cuts.last(self._held, self._searched)
        if found is not None:
            end, begin = found
            text, self._held = self._held[:end], self._held[begin:]
            yield self._piece(document, text)
        elif len(self._held) >= UNCUT_BYTES:
            end = whole_characters(self._held)
            text, self._held = self._held[:end], self._held[end:]
            yield self._piece(document, text, cut_anywhere=True)
        else:
            self._searched = max(len(self._held) - 8, 1)
            return
        self._searched = 1

    def _piece(
        self, document: TextDocument, text: bytes, *, ends: bool = False, cut_anywhere: bool = False
    ) -> TextDocument:
        piece = replace(
            document,
            text=text,
            prompt=self._prompt if self._begins else None,
            source_bytes=self._source_bytes,
            begins=self._begins,
            ends=ends,
            cut_anywhere=cut_anywhere,
        )
        self._begins, self._source_bytes = False, 0
        return piece
