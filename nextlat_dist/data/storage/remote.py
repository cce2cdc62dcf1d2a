"""A directory of a web server or an object store, read through fsspec.

Invariant: what goes wrong on the way is tried again, and then it is a ConnectionError with the file, the last cause and
the number of tries; nothing waits for ever. User, password and query of a URL reach the server and nothing else: no
message and no name in the cache.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from nextlat_dist.data.storage.base import SMALL_FILE_BYTES, too_large
from nextlat_dist.data.storage.cache import CacheSettings, RangeCache
from nextlat_dist.data.storage.catalogue import PARALLEL_REQUESTS, StorageEntry, shown, storage_entry
from nextlat_dist.errors import UserError

T = TypeVar("T")

TIMEOUT_SECONDS = 30.0
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)
# From this many files of one directory on, listing it is cheaper than asking for each.
LISTED_FROM = 32
# What says that a file has changed: http, s3, gs.
_STAMPS = ("size", "ETag", "Last-Modified", "LastModified", "etag", "generation")


class RemoteStorage:
    """A directory of a web server or bucket; `name` may be any URL of the catalogue's schemes.

    Args:
        cache: where ranges are kept, None for nowhere.
        timeout_seconds: silence after which a request is given up.
        pauses_seconds: before each new try; their number is that of the new tries.

    Raises:
        UserError: the scheme is unknown, its library is not installed, or the URL holds credentials that it cannot use.
    """

    def __init__(
        self,
        url: str,
        cache: CacheSettings | None = None,
        *,
        timeout_seconds: float = TIMEOUT_SECONDS,
        pauses_seconds: Sequence[float] = PAUSES_SECONDS,
    ) -> None:
        self._url = url
        self._settings = cache
        self._cache = None if cache is None else RangeCache(cache)
        self._timeout = timeout_seconds
        self._pauses = tuple(pauses_seconds)
        self._opened: dict[tuple[int, str], Any] = {}
        self._entries: dict[str, StorageEntry] = {}
        self._entry(url)

    def _entry(self, url: str) -> StorageEntry:
        """The entry of a URL's scheme. Raises UserError as `storage_entry`, at the first URL of a scheme."""
        scheme = urlsplit(url).scheme
        if scheme not in self._entries:
            self._entries[scheme] = storage_entry(url)
        return self._entries[scheme]

    @property
    def url(self) -> str:
        return shown(self._url).rstrip("/")

    def full_name(self, name: str) -> str:
        return shown(self._address(name))

    def _address(self, name: str) -> str:
        """The URL to ask for; a query of the directory's goes along (signed access to all its files)."""
        if "://" in name:
            storage_entry(name)  # every one: it may hold credentials
            return name
        if not self._entry(self._url).is_web:
            return f"{self._url.rstrip('/')}/{name}"
        path, mark, query = self._url.partition("?")
        return f"{path.rstrip('/')}/{quote(name)}{mark}{query}"

    def _files(self, address: str) -> Any:
        """The file system of a URL; one of its own in a forked process, whose parent's connections are not its own."""
        scheme = urlsplit(address).scheme
        key = (os.getpid(), scheme)
        if key not in self._opened:
            self._opened.setdefault(key, self._entry(address).open_files(self._timeout))
        return self._opened[key]

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        address = self._address(name)
        return self._insist(address, partial(_whole, address, limit, is_web=self._entry(address).is_web))

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        addresses = [self._address(name) for name in names]
        known = self._listed_sizes(addresses)

        def size(address: str) -> int | None:
            if address in known:
                return known[address]
            try:
                info = self._insist(address, lambda files: files.info(address))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(size, addresses))

    def _listed_sizes(self, addresses: Sequence[str]) -> dict[str, int | None]:
        """Sizes of files with many neighbours in `addresses`, by a listing, where the server has and allows one."""
        folders: dict[str, list[str]] = {}
        for address in addresses:
            if not self._entry(address).is_web:
                folders.setdefault(address.rpartition("/")[0], []).append(address)
        known: dict[str, int | None] = {}
        for folder, inside in folders.items():
            if len(inside) < LISTED_FROM:
                continue
            try:
                entries = self._insist(folder, partial(_entries, folder))
            except FileNotFoundError:
                entries = []
            except PermissionError:
                continue
            sizes = {entry["name"]: entry["size"] for entry in entries if entry["type"] == "file"}
            known |= {address: sizes.get(address.partition("://")[2]) for address in inside}
        return known

    def stamp(self, name: str) -> str:
        address = self._address(name)
        info = self._insist(address, lambda files: files.info(address))
        return "-".join(str(info[key]).strip('"') for key in _STAMPS if info.get(key))

    def read_range(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        address = self._address(name)
        key = (shown(address), offset, length, crc32)
        if self._cache is not None and (kept := self._cache.get(*key)) is not None:
            return kept
        data = self._insist(address, partial(_range, address, offset, offset + length))
        if self._cache is not None and zlib.crc32(data) == crc32:
            self._cache.put(*key, data)
        return data

    def _insist(self, address: str, request: Callable[[Any], T]) -> T:
        """The answer to a request, tried again after transient errors.

        No error is chained to what went wrong below: that may hold the whole URL.
        """
        pauses = () if self._entry(address).retries else self._pauses
        for number, pause in enumerate((*pauses, None), start=1):
            try:
                return request(self._files(address))
            except UserError:
                raise
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "no such file", shown(address)) from None
            except Exception as error:
                if _is_denied(error):
                    cause = f"access denied: {_cause(error, address)}"
                    raise PermissionError(errno.EACCES, cause, shown(address)) from None
                if pause is None or not _is_transient(error):
                    tries = f", tried {number} times" if number > 1 else ""
                    kind, code = (
                        (ConnectionError, errno.ECONNABORTED) if _is_transient(error) else (OSError, errno.EINVAL)
                    )
                    raise kind(code, _cause(error, address) + tries, shown(address)) from None
            # Of its own, so that no seeded generator of the training moves; spread, so that ranks do not come together.
            time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))
        raise AssertionError("the last try returns or raises")


def _entries(folder: str, files: Any) -> list[dict[str, Any]]:
    return list(files.ls(folder, detail=True))


def _whole(address: str, limit: int, files: Any, *, is_web: bool) -> bytes:
    """A whole file of at most `limit` bytes."""
    if is_web:
        return bytes(files.cat_file(address, limit=limit))
    data = _range(address, 0, limit + 1, files)
    if len(data) > limit:
        raise too_large(limit)
    return data


def _range(address: str, start: int, end: int, files: Any) -> bytes:
    try:
        return bytes(files.cat_file(address, start=start, end=end))
    except Exception as error:
        # How s3fs and gcsfs say that the range begins after the end of the file.
        if _status(error) == 416:
            return b""
        raise


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of s3fs or gcsfs."""
    answer = getattr(error.__cause__, "response", None) or {}
    code = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or getattr(error, "code", None)
    return code if isinstance(code, int) else None


def _is_denied(error: Exception) -> bool:
    # The text is that of gcsfs.
    return isinstance(error, PermissionError) or str(error).startswith("Forbidden:") or _status(error) in (401, 403)


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status is not None and status not in (408, 429):
        return status >= 500 or isinstance(error, TimeoutError)
    return not isinstance(error, ValueError) and getattr(error, "errno", None) not in (errno.EINVAL, errno.EFBIG)


def _cause(error: Exception, address: str) -> str:
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return "no answer in time"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    user = urlsplit(address).netloc.rpartition("@")[0]
    for secret in (address, urlsplit(address).query, user, user.partition(":")[2]):
        text = text.replace(secret, "…") if secret else text
    status = _status(error)
    return " ".join([f"HTTP status {status}:"] * (status is not None) + text.split())
