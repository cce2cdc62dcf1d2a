"""Open the storage of a dataset, given by its path or URL."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from nextlat_dist.data.storage.base import SMALL_FILE_BYTES, Storage
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.local import LocalStorage, path_of
from nextlat_dist.data.storage.remote import RemoteStorage
from nextlat_dist.errors import HIDDEN, UserError, without_secrets

URLS_VARIABLE = "NEXTLAT_URLS"
_REFERENCE = re.compile(r"\$\{\w+\}")


def open_storage(url: str | Path, cache: CacheSettings | None = None) -> Storage:
    """The storage of a dataset: a path, a file:// URL, or one whose scheme is in the catalogue.

    Args:
        cache: where ranges of remote files are kept, None for nowhere.

    Raises:
        UserError: the scheme is none of these, its library is not installed, or the cache directory cannot be used.
    """
    if isinstance(url, str) and "://" in url:
        url = completed(url)
        home = LocalStorage(path_of(url)) if url.startswith("file:") else RemoteStorage(url, cache)
    else:
        home = LocalStorage(Path(url))
    return _AnyStorage(home, cache)


def completed(url: str) -> str:
    """A URL whose password or signature was left out when it was saved, with both again.

    They are looked for among the URLs in the environment variable NEXTLAT_URLS, separated by blanks or lines; only one
    of the same scheme, host and path is taken.

    Raises:
        UserError: there is none, or a variable stands in the URL.
    """
    if _REFERENCE.search(url):
        raise UserError(
            f"{url} names an environment variable, which is replaced only in a configuration that is passed with "
            "--config; give the URL itself"
        )
    if f"://{HIDDEN}@" not in url and not url.endswith(f"?{HIDDEN}"):
        return url
    for known in os.environ.get(URLS_VARIABLE, "").split():
        if without_secrets(known) == url:
            return known
    raise UserError(
        f"{url} was saved without its password or signature; give the whole URL again (in the run's own config, as in "
        f"https://me:${{PASSWORD}}@host/data, or in the environment variable {URLS_VARIABLE})"
    )


class _AnyStorage:
    """A storage whose names may be full paths and URLs of other storages too: an adopted tar stays where it is."""

    def __init__(self, home: Storage, cache: CacheSettings | None) -> None:
        self._home = home
        self._cache = cache
        self._local = home if isinstance(home, LocalStorage) else LocalStorage(Path("/"))
        self._remote = home if isinstance(home, RemoteStorage) else None

    def _find(self, name: str) -> tuple[Storage, str]:
        if "://" not in name:
            return (self._local if name.startswith("/") else self._home), name
        if name.startswith("file:"):
            return self._local, str(path_of(name))
        if self._remote is None:
            self._remote = RemoteStorage(name.rpartition("/")[0], self._cache)
        return self._remote, name

    def __reduce__(self) -> tuple[type[_AnyStorage], tuple[Storage, CacheSettings | None]]:
        return _AnyStorage, (self._home, self._cache)

    @property
    def url(self) -> str:
        return self._home.url

    def full_name(self, name: str) -> str:
        storage, name = self._find(name)
        return storage.full_name(name)

    def read(self, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        storage, name = self._find(name)
        return storage.read(name, limit)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        found = [self._find(name) for name in names]
        known: dict[tuple[Storage, str], int | None] = {}
        for storage in {storage for storage, _ in found}:
            inside = [name for other, name in found if other is storage]
            known |= {(storage, name): size for name, size in zip(inside, storage.sizes(inside), strict=True)}
        return [known[key] for key in found]

    def stamp(self, name: str) -> str:
        storage, name = self._find(name)
        return storage.stamp(name)

    def read_range(self, name: str, offset: int, length: int, crc32: int) -> bytes:
        storage, name = self._find(name)
        return storage.read_range(name, offset, length, crc32)
