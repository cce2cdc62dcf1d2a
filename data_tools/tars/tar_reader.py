"""Read a tar once from end to end, as it must be read to adopt or verify it.

Invariant: every byte passes exactly once and goes into the sha256; the bytes not yet released can be had again by their
offsets, so that records are digested while a tar reader goes by. Works for every storage, local or remote.
"""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nextlat_dist.data.storage.base import Storage

CHUNK_BYTES = 1 << 22
BLOCK_BYTES = 512
END_BYTES = 2 * BLOCK_BYTES
NO_CRC32 = -1  # no range has it: nothing comes from a cache, and nothing goes there

# What tarfile lets through for damaged headers and content, next to OSError.
DAMAGED = (tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError, zlib.error, lzma.LZMAError)


class TarDamage(ValueError):
    """The bytes are no complete tar."""


class TarReader:
    """A file read forwards. `read` is what tar readers call.

    Attributes:
        position: where the next `read` begins.
    """

    def __init__(self, storage: Storage, name: str, size: int, moved: Callable[[int], object]) -> None:
        """`moved` is called with the number of bytes of each chunk, for progress."""
        self._storage, self._name, self._size, self._moved = storage, name, size, moved
        self._buffer = bytearray()
        self._start = 0
        self._sha256 = hashlib.sha256()
        self.position = 0

    def read(self, count: int) -> bytes:
        data = self.span(self.position, self.position + count)
        self.position += len(data)
        return data

    def span(self, begin: int, end: int) -> bytes:
        """Bytes `begin` to `end` (exclusive), none of them released; fewer at the end of the file."""
        assert begin >= self._start, "released already"
        while self.fetched < min(end, self._size):
            self._fetch()
        return bytes(memoryview(self._buffer)[begin - self._start : end - self._start])

    @property
    def fetched(self) -> int:
        return self._start + len(self._buffer)

    def _fetch(self) -> None:
        chunk = self._storage.read_range(
            self._name, self.fetched, min(CHUNK_BYTES, self._size - self.fetched), crc32=NO_CRC32
        )
        if not chunk:
            raise TarDamage(f"it ends at byte {self.fetched} of {self._size}")
        self._sha256.update(chunk)
        self._buffer += chunk
        self._moved(len(chunk))

    def release(self, before: int) -> None:
        """Forget the bytes up to `before` that have been read."""
        self._forget(min(before, self.position))

    def _forget(self, before: int) -> None:
        if before > self._start:
            del self._buffer[: before - self._start]
            self._start = before

    def finish(self) -> str:
        """sha256 of the whole file; reads and forgets what is left."""
        while self.fetched < self._size:
            self._forget(self.fetched)
            self._fetch()
        return self._sha256.hexdigest()

    def check_end(self, offset: int) -> None:
        """Raises TarDamage unless there are two zero blocks at `offset` and nothing but zeros after them.

        Tar readers take one zero block, a damaged header and a missing rest alike for the end.
        """
        if self._size - offset < END_BYTES:
            raise TarDamage(f"it is cut off at byte {self._size}: a tar ends in two zero blocks")
        if any(self.span(offset, offset + END_BYTES)):
            raise TarDamage(f"the header at offset {offset} is damaged, and readers silently stop there")
        at = offset
        while at < self._size:
            self._forget(at)
            data = self.span(at, at + CHUNK_BYTES)
            if data.count(0) != len(data):
                raise TarDamage(f"data follows its end at offset {offset}, and readers silently stop there")
            at += len(data)


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar; `begin` to `end` are its bytes with header and padding."""

    name: str
    begin: int
    end: int
    content: bytes


def tar_members(reader: TarReader, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """Regular files in order, with content for those with a wanted name and b"" for the others; checks the end.

    Raises:
        TarDamage: it is no tar, or not a complete one.
    """
    try:
        # webdataset's own iterator tells no offsets; this is the one it is made of.
        tar = tarfile.TarFile.open(fileobj=reader, mode="r|")  # type: ignore[call-overload]
    except tarfile.TarError as error:
        raise TarDamage(f"it is no plain tar ({error}); a compressed one must be unpacked") from None
    try:
        for info in tar:
            tar.members = []
            if not info.isreg():
                continue
            file = tar.extractfile(info) if wanted(info.name) else None
            content = b"" if file is None else file.read()
            # Not from its size: a file with holes (`tar -S`) takes less.
            yield TarMember(info.name, info.offset, tar.offset, content)
    except TarDamage:
        raise
    except DAMAGED as error:
        raise TarDamage(f"{error}, near offset {tar.offset}") from None
    reader.check_end(tar.offset)
