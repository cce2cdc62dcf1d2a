"""Reads of a file or a server are bounded by what may be there."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nextlat_dist.data import shard_format
from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.cache import CacheSettings, RangeCache
from nextlat_dist.data.storage.local import LocalStorage
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.storage.remote import RemoteStorage
from nextlat_dist.errors import UserError

MEGABYTE = 1 << 20


class _Endless(BaseHTTPRequestHandler):
    """Sends without end, whatever it is asked for, and says no length."""

    sent = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.send_response(206 if asked else 200)
        if asked:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            self.send_header("Content-Range", f"bytes {begin}-{end}/*")
        self.end_headers()
        try:
            while type(self).sent < 200 * MEGABYTE:
                self.wfile.write(b" " * 65536)
                type(self).sent += 65536
        except OSError:
            pass


@pytest.fixture
def endless() -> Iterator[str]:
    _Endless.sent = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/data"
    server.shutdown()
    server.server_close()


def test_an_endless_manifest_is_refused_while_it_is_read(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_format, "MANIFEST_BYTES", MEGABYTE)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read .*1,048,576 bytes"):
        read_manifest(open_storage(endless))
    assert _Endless.sent < 50 * MEGABYTE


def test_an_endless_range_is_refused_while_it_is_read(endless: str) -> None:
    with pytest.raises(OSError, match="1,000 bytes"):
        RemoteStorage(endless, pauses_seconds=()).read_range("x.tar", 0, 1000, 0)
    assert _Endless.sent < 50 * MEGABYTE


def test_a_local_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert storage.read("a", 100) == b"x" * 100
    with pytest.raises(OSError, match="99 bytes") as caught:
        storage.read("a", 99)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_manifest_is_refused(tmp_path: Path) -> None:
    """Opening it would wait for a writer for ever."""
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="not a regular file"):
        read_manifest(tmp_path)


def test_a_cached_range_that_grew_is_read_no_further(tmp_path: Path) -> None:
    import zlib

    cache = RangeCache(CacheSettings(tmp_path, 10**6))
    cache.put("u", 0, 4, zlib.crc32(b"abcd"), b"abcd")
    assert cache.get("u", 0, 4, zlib.crc32(b"abcd")) == b"abcd"
    (kept,) = [path for path in tmp_path.glob("*/*") if path.is_file()]
    with kept.open("r+b") as file:
        file.truncate(1 << 40)  # with a hole; no memory would hold it
    assert cache.get("u", 0, 4, zlib.crc32(b"abcd")) is None
