"""A directory of a local or network file system."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nextlat_dist.data.storage.base import SMALL_FILE_BYTES, too_large
from nextlat_dist.errors import UserError

# Of one storage: ten sources at once stay below the usual limit of 1024 for a process.
OPEN_FILES = 64


def path_of(url: str) -> Path:
    """The path of a file:// URL. Raises UserError where it names another host."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{url} names the host {parts.netloc!r}; a local file is file:///full/path")
    return Path(unquote(parts.path))


class _OpenFile:
    """A file descriptor, closed when nobody uses it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        # Absent when the file could not be opened.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _open_in(directory: str, name: str) -> _OpenFile:
    return _OpenFile(os.path.join(directory, name))


class LocalStorage:
    """A directory of a local or network file system.

    Files stay open between two range reads. One that is replaced by another meanwhile is still read as it was; one that
    is written to shows its new bytes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        # A reader holds the file that it reads, so one that falls out of here is never closed under it. Two threads may
        # open the same file at once; the loser's descriptor is closed by its reference count.
        # Holds no reference to this storage: the files are closed with it, not some time later.
        self._open = lru_cache(OPEN_FILES)(partial(_open_in, self._directory))

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[Path]]:
        return LocalStorage, (Path(self._directory),)

    @property
    def url(self) -> str:
        return self._directory

    def full_name(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        path = self.full_name(name)
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, "is a directory", path)
            raise OSError(errno.EINVAL, "is not a regular file", path)
        if status.st_size > limit:
            raise too_large(limit)
        with open(path, "rb") as file:
            data = file.read(status.st_size + 1)
        if len(data) > limit:
            raise too_large(limit)
        return data

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [self._size(name) for name in names]

    def _size(self, name: str) -> int | None:
        try:
            status = os.stat(self.full_name(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def stamp(self, name: str) -> str:
        status = os.stat(self.full_name(name))
        return f"{status.st_size}-{status.st_mtime_ns}"

    def read_range(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        try:
            return _pread(self._open(name), offset, length)
        except OSError:
            # A network file system forgets a file that was replaced (ESTALE), or there are too many open files.
            self._open.cache_clear()
            return _pread(self._open(name), offset, length)


def _pread(file: _OpenFile, offset: int, length: int) -> bytes:
    data = os.pread(file.descriptor, length, offset)
    if len(data) == length:
        return data
    # A network file system may give less than it has.
    parts = [data]
    while data and length > len(data):
        offset, length = offset + len(data), length - len(data)
        data = os.pread(file.descriptor, length, offset)
        parts.append(data)
    return b"".join(parts)
