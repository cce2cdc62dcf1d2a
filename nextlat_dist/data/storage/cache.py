"""Byte ranges of remote files, kept on a local disk and shared by the processes of a host.

    directory/lock            the bytes kept, in decimal digits; locked while a range is added
    directory/ab/abcdef…      one range; the name is a hash of where it came from

Invariant: a range is handed out only when its bytes have the crc32 asked for, and the ranges together never stay above
the bound. A process killed at any point, or a file deleted by hand, costs at most a new download: the count is raised
before a file appears, and counted again whenever it says that the cache is full.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.reporting.log import logger

log = logger(__name__)

LOCK_FILE = "lock"
COUNT_DIGITS = 20
# Evicting goes down to this share of the bound, so that the directory is walked once for many ranges.
KEPT_SHARE = 0.9
# Another process that adds a range needs less; one that evicts may need seconds, and then it is better not to wait.
LOCK_TRIES, LOCK_PAUSE_SECONDS = 10, 0.002
# A temporary file this old belongs to a process that died.
STALE_SECONDS = 3600


@dataclass(frozen=True)
class CacheSettings:
    """Where ranges of remote files are kept, and how many bytes of them."""

    directory: Path
    max_bytes: int


class RangeCache:
    """The ranges in one directory. Safe to use from several threads and processes.

    Raises:
        UserError: the directory cannot be made.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._directory = settings.directory
        self._max_bytes = settings.max_bytes
        self._given_up = False
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache directory {self._directory} cannot be made ({error.strerror}); choose another one"
            ) from None

    def _path(self, url: str, offset: int, length: int, crc32: int) -> Path:
        # The crc32 keeps two versions of one file apart.
        digest = hashlib.sha256(f"{url}\n{offset}\n{length}\n{crc32}".encode()).hexdigest()
        return self._directory / digest[:2] / digest

    def get(self, url: str, offset: int, length: int, crc32: int) -> bytes | None:
        """The range, or None when it is not here; a damaged one is deleted."""
        path = self._path(url, offset, length, crc32)
        try:
            with path.open("rb") as file:
                data = file.read(length + 1)  # whatever was put there has no more to say
            if zlib.crc32(data) != crc32:
                path.unlink(missing_ok=True)
                return None
            now = time.time_ns()
            # Another process may evict it just now.
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, ns=(now, now))
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None
        return data

    def put(self, url: str, offset: int, length: int, crc32: int, data: bytes) -> None:
        """Keep a range whose crc32 was checked. Never fails: what cannot be kept is read again another time."""
        if self._given_up or len(data) > self._max_bytes:
            return
        path = self._path(url, offset, length, crc32)
        temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                temporary.write_bytes(data)
                with self._locked() as lock:
                    if lock is not None and not path.exists():
                        self._make_room(lock, len(data))
                        temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except FileNotFoundError:
            # Somebody deleted the directory under us.
            with contextlib.suppress(OSError):
                self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._give_up(error)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The locked count's descriptor, or None when others keep it busy."""
        descriptor = os.open(self._directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            for _ in range(LOCK_TRIES):
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(LOCK_PAUSE_SECONDS)
                else:
                    yield descriptor
                    return
            yield None
        finally:
            os.close(descriptor)

    def _make_room(self, lock: int, size: int) -> None:
        """Count `size` more bytes, evicting the ranges that were unused for longest if there are too many."""
        count = os.pread(lock, COUNT_DIGITS, 0)
        total = int(count) if len(count) == COUNT_DIGITS and count.isdigit() else None
        if total is None or total + size > self._max_bytes:
            total = self._evict(size)
        os.pwrite(lock, b"%0*d" % (COUNT_DIGITS, total + size), 0)

    def _evict(self, size: int) -> int:
        """Walk the directory and delete until `size` more bytes fit well; the bytes that are left."""
        files = []
        stale = time.time_ns() - STALE_SECONDS * 10**9
        for folder in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for entry in os.scandir(folder):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        if not entry.name.endswith(".tmp"):
                            files.append((status.st_mtime_ns, status.st_size, entry.path))
                        elif status.st_mtime_ns < stale:
                            os.unlink(entry.path)
        total = sum(kept for _, kept, _ in files)
        if total + size <= self._max_bytes:
            return total
        bound = min(self._max_bytes - size, int(self._max_bytes * KEPT_SHARE))
        for _, kept, path in sorted(files):
            if total <= bound:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= kept
        return total

    def _give_up(self, error: OSError) -> None:
        if not self._given_up:
            self._given_up = True
            log.warning(
                "cache directory %s cannot be used (%s); continuing without keeping anything more in it",
                self._directory,
                error.strerror,
            )
