"""The tokens of one document, wherever they fit: in memory, or in a temporary file when they are many."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

SPOOL_TOKENS = 1 << 22  # bounds the memory of a document made of pieces: 17 MB of uint32
CHUNK_TOKENS = 1 << 16  # bounds the memory of reading the file back: 262 KB of uint32


class SpooledTokens:
    """Tokens of a long document in a file without a name, which is gone with this process."""

    def __init__(self, directory: Path, dtype: np.dtype) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self._length = 0
        self.dtype = dtype
        self.largest = 0

    def append(self, tokens: np.ndarray) -> None:
        assert tokens.dtype == self.dtype
        self._file.seek(0, 2)
        self._file.write(tokens.tobytes())
        self._length += len(tokens)
        self.largest = max(self.largest, int(tokens.max(initial=0)))

    def __len__(self) -> int:
        return self._length

    def chunks(self) -> Iterator[bytes]:
        """The tokens as bytes, a part at a time."""
        self._file.seek(0)
        while data := self._file.read(CHUNK_TOKENS * self.dtype.itemsize):
            yield data

    def array(self) -> np.ndarray:
        """All of them, in memory."""
        return np.frombuffer(b"".join(self.chunks()), self.dtype)


Tokens = np.ndarray | SpooledTokens


class TokenCollector:
    """Puts the pieces of one document together. `directory` holds the temporary file of a long one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pieces: list[np.ndarray] = []
        self._spooled: SpooledTokens | None = None
        self._length = 0

    def add(self, tokens: np.ndarray) -> None:
        if self._spooled is None and self._length + len(tokens) > SPOOL_TOKENS and self._pieces:
            self._spooled = SpooledTokens(self._directory, tokens.dtype)
            for piece in self._pieces:
                self._spooled.append(piece)
            self._pieces = []
        self._length += len(tokens)
        if self._spooled is None:
            self._pieces.append(tokens)
        else:
            self._spooled.append(tokens)

    def take(self) -> Tokens:
        """The document's tokens; the next piece begins another one."""
        found: Tokens
        if self._spooled is not None:
            found = self._spooled
        else:
            found = self._pieces[0] if len(self._pieces) == 1 else np.concatenate(self._pieces)
        self.drop()
        return found

    def drop(self) -> None:
        """Forget the document."""
        self._pieces, self._spooled, self._length = [], None, 0


def chunks_of(documents: Sequence[Tokens]) -> Iterator[bytes]:
    """The tokens of several documents as bytes, a part at a time."""
    for tokens in documents:
        if isinstance(tokens, SpooledTokens):
            yield from tokens.chunks()
        else:
            yield tokens.tobytes()
