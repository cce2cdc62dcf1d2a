"""Where a dataset's files lie, and how their bytes are read.

Invariant: a place hands out bytes as they are there; whoever reads them checks them. Missing files raise
FileNotFoundError, everything else that goes wrong another OSError. All methods may be called from several threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol


class Place(Protocol):
    """A directory of files, local or remote. `name` is relative to it, or a full path or URL of its own."""

    @property
    def url(self) -> str:
        """Full path or URL of the directory."""
        ...

    def full_name(self, name: str) -> str:
        """Full path or URL of a file, for messages."""
        ...

    def read(self, name: str) -> bytes:
        """A whole (small) file."""
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


class LocalPlace:
    """A directory of a local or network file system."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def url(self) -> str:
        return str(self._directory)

    def full_name(self, name: str) -> str:
        return str(self._directory / name)

    def read(self, name: str) -> bytes:
        return (self._directory / name).read_bytes()

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [self._size(name) for name in names]

    def _size(self, name: str) -> int | None:
        path = self._directory / name
        return path.stat().st_size if path.is_file() else None

    def stamp(self, name: str) -> str:
        status = (self._directory / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"

    def read_range(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        descriptor = os.open(self._directory / name, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)


def open_place(url: str | Path) -> Place:
    """The place of a dataset."""
    return LocalPlace(Path(url))
