"""The format of a file, told by its first bytes, and its content, decompressed.

gzip, zstd, bzip2 and xz are read, whatever the file is called; a name that ends like one of them and a content that is
none is an error. Archives, other compressions and UTF-16 are named, never taken for text.

Invariant: a compressed file that was cut short is an error, at every length; memory is bounded by the window that the
file asks for (zstd: at most 2 GiB, `zstd --long=31`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from typing import BinaryIO

from nextlat_dist.errors import UserError, require_extra

HEAD_BYTES = 16
BOM = b"\xef\xbb\xbf"
BINARY_PROBE_BYTES = 8192
# zstd makes at most 32 KiB of a byte, so this bounds what one step of decompression gives.
ZSTD_INPUT_BYTES = 4096
ZSTD_WINDOW_BYTES = 1 << 31
_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
_SUFFIXES = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd", "bz2": "bzip2", "xz": "xz"}
_SUFFIX = re.compile(rf"\.({'|'.join(_SUFFIXES)})$", re.IGNORECASE)
# What is no text although it may hold no byte 0 near its beginning.
_OTHERS = {
    "a zip archive": re.compile(rb"PK\x03\x04|PK\x05\x06"),
    "a 7z archive": re.compile(rb"7z\xbc\xaf\x27\x1c"),
    "a rar archive": re.compile(rb"Rar!\x1a\x07"),
    "compressed with lz4": re.compile(rb"\x04\x22\x4d\x18"),
    "compressed with compress": re.compile(rb"\x1f\x9d"),
    "a PDF document": re.compile(rb"%PDF-"),
}
# UTF-32 first: its mark begins with that of UTF-16.
_ENCODINGS = {
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"),
    "UTF-16": re.compile(rb"\xff\xfe|\xfe\xff"),
}


def plain_name(name: str) -> str:
    """The name without the suffix of a compression, in lower case: what it says of the content."""
    return _SUFFIX.sub("", name).lower()


def looks_compressed(name: str) -> bool:
    return _SUFFIX.search(name) is not None


def utf_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, where the first bytes say so."""
    return _first(_ENCODINGS, head)


def other_format(head: bytes) -> str | None:
    """What else the first bytes say that this is, in words; None for what may be text."""
    return _first(_OTHERS, head)


def is_binary(head: bytes) -> bool:
    """Whether this, the beginning of a file, is not that of a text."""
    return b"\0" in head[:BINARY_PROBE_BYTES] or other_format(head) is not None


def without_bom(content: bytes) -> bytes:
    """The beginning of a text without the mark that some editors put there."""
    return content.removeprefix(BOM)


def _first(known: dict[str, re.Pattern[bytes]], head: bytes) -> str | None:
    return next((kind for kind, magic in known.items() if magic.match(head)), None)


def peeked(stream: BinaryIO) -> tuple[bytes, BinaryIO]:
    """The first bytes of a stream, and a stream that still has them."""
    head = stream.read(HEAD_BYTES)
    if stream.seekable():
        stream.seek(-len(head), io.SEEK_CUR)
        return head, stream
    return head, io.BufferedReader(_Rejoined(head, stream))


def decompressed(raw: BinaryIO, name: str) -> BinaryIO:
    """The content of a stream, by its first bytes.

    Raises:
        UserError: its name says that it is compressed, and it is not so; or reading needs a package.
    """
    head, raw = peeked(raw)
    kind = _first(_COMPRESSED, head)
    if kind is None and (said := _SUFFIX.search(name)):
        wanted = _SUFFIXES[said[1].lower()]
        what = f"its first bytes are not those of {wanted}" if head else "it is empty"
        raise UserError(f"input {name} cannot be read: {what}; copy or compress it again, or give it another name")
    if kind == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if kind == "zstd":
        return io.BufferedReader(_Zstd(raw, name))
    if kind == "bzip2":
        return io.BufferedReader(bz2.BZ2File(raw))
    if kind == "xz":
        return io.BufferedReader(lzma.LZMAFile(raw))
    return raw


# What reading a damaged or truncated file raises.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


class _Rejoined(io.RawIOBase):
    """First these bytes, then the stream."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._head[: len(buffer)]
        self._head = self._head[len(data) :]
        if not data:
            read = getattr(self._stream, "read1", self._stream.read)
            data = read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Zstd(io.RawIOBase):
    """The frames of a zstd stream, one after another; unlike zstandard's reader, it notices a frame without its end."""

    def __init__(self, raw: BinaryIO, name: str) -> None:
        require_extra("data", "zstandard", purpose=f"reading {name}")
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._output:
            self._input = self._input or self._raw.read(ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends before the end of its last zstd frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise OSError(f"zstd: {error}") from None
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
