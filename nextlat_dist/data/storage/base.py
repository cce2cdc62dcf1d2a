"""The interface of a storage: a directory of files, wherever it lies, whose bytes are read.

Invariant: a storage hands out bytes as they are there; whoever reads them checks them. Missing files raise
FileNotFoundError, everything else that goes wrong another OSError. All methods may be called from several threads,
and from a process forked or spawned later.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Protocol

SMALL_FILE_BYTES = 1 << 28


class Storage(Protocol):
    """A directory of files, local or remote. `name` is relative to it, or a full path or URL of its own."""

    @property
    def url(self) -> str:
        """Full path or URL of the directory, without user, password and query: for messages."""
        ...

    def full_name(self, name: str) -> str:
        """Full path or URL of a file, without user, password and query: for messages."""
        ...

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        """A whole (small) file. Raises OSError (EFBIG) when it has more than `limit` bytes: what says how long it is
        may be wrong, and a server may send without end."""
        ...

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of each file, None for one that does not exist."""
        ...

    def stamp(self, name: str) -> str:
        """Changes whenever the file does: size and time of change, or an ETag."""
        ...

    def read_range(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end of the file. A cached copy must have this crc32."""
        ...


def too_large(limit: int) -> OSError:
    """The error of `Storage.read` for a file of more than `limit` bytes."""
    return OSError(errno.EFBIG, f"it has more than the {limit:,} bytes that it may have")
