"""Where a dataset's files lie, and how their bytes are read.

Invariant: a place hands out bytes as they are there; whoever reads them checks them. Missing files raise
FileNotFoundError, everything else that goes wrong another OSError. All methods may be called from several threads,
and from a process forked or spawned later.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.remote import RemotePlace
from nextlat_dist.errors import UserError

# Of one place: ten sources at once stay below the usual limit of 1024 for a process.
OPEN_FILES = 64


class Place(Protocol):
    """A directory of files, local or remote. `name` is relative to it, or a full path or URL of its own."""

    @property
    def url(self) -> str:
        """Full path or URL of the directory, without user, password and query: for messages."""
        ...

    def full_name(self, name: str) -> str:
        """Full path or URL of a file, without user, password and query: for messages."""
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


class LocalPlace:
    """A directory of a local or network file system.

    Files stay open between two range reads. One that is replaced by another meanwhile is read on as it was; one that is
    written to shows its new bytes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        # A reader holds the file that it reads, so one that falls out of here is never closed under it. Two threads may
        # open the same file at once; the loser's descriptor is closed by its reference count.
        # Holds no reference to this place: the files are closed with it, not some time later.
        self._open = lru_cache(OPEN_FILES)(partial(_open_in, self._directory))

    def __reduce__(self) -> tuple[type[LocalPlace], tuple[Path]]:
        return LocalPlace, (Path(self._directory),)

    @property
    def url(self) -> str:
        return self._directory

    def full_name(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def read(self, name: str) -> bytes:
        return Path(self.full_name(name)).read_bytes()

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


class _AnyPlace:
    """A place whose names may be full paths and URLs of other places too: an adopted tar stays where it is."""

    def __init__(self, home: Place, cache: CacheSettings | None) -> None:
        self._home = home
        self._cache = cache
        self._local = home if isinstance(home, LocalPlace) else LocalPlace(Path("/"))
        self._remote = home if isinstance(home, RemotePlace) else None

    def _find(self, name: str) -> tuple[Place, str]:
        if "://" not in name:
            return (self._local if name.startswith("/") else self._home), name
        if name.startswith("file:"):
            return self._local, str(_file_path(name))
        if self._remote is None:
            self._remote = RemotePlace(name.rpartition("/")[0], self._cache)
        return self._remote, name

    def __reduce__(self) -> tuple[type[_AnyPlace], tuple[Place, CacheSettings | None]]:
        return _AnyPlace, (self._home, self._cache)

    @property
    def url(self) -> str:
        return self._home.url

    def full_name(self, name: str) -> str:
        place, name = self._find(name)
        return place.full_name(name)

    def read(self, name: str) -> bytes:
        place, name = self._find(name)
        return place.read(name)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        found = [self._find(name) for name in names]
        known: dict[tuple[Place, str], int | None] = {}
        for place in {place for place, _ in found}:
            inside = [name for other, name in found if other is place]
            known |= {(place, name): size for name, size in zip(inside, place.sizes(inside), strict=True)}
        return [known[key] for key in found]

    def stamp(self, name: str) -> str:
        place, name = self._find(name)
        return place.stamp(name)

    def read_range(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        place, name = self._find(name)
        return place.read_range(name, offset, length, crc32)


def _file_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise UserError(f"{url} names the host {parts.netloc!r}; a local file is file:///full/path")
    return Path(unquote(parts.path))


def open_place(url: str | Path, cache: CacheSettings | None = None) -> Place:
    """The place of a dataset: a path, or a file://, http://, https://, s3:// or gs:// URL.

    Args:
        cache: where ranges of remote files are kept, None for nowhere.

    Raises:
        UserError: the scheme is none of these, its library is not installed, or the cache directory cannot be used.
    """
    if isinstance(url, str) and "://" in url:
        home = LocalPlace(_file_path(url)) if url.startswith("file:") else RemotePlace(url, cache)
    else:
        home = LocalPlace(Path(url))
    return _AnyPlace(home, cache)
