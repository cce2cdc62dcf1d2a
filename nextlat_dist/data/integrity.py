"""The SHA-256 of every shard, checked when it is first opened and remembered.

Invariant: `first` trusts a shard without reading it only while a stamp says that the same file (by size and time of
change) had the hash of the manifest. Stamps lie in the user's cache directory, one small file per shard, locked while a
shard is hashed, so that the ranks of a host hash it once. The crc32 of each record is checked besides, always.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import defaultdict
from pathlib import Path
from typing import Literal

from nextlat_dist.data.shard_format import ShardEntry, index_name
from nextlat_dist.data.storage.base import Storage

Verify = Literal["always", "first", "never"]
CHUNK_BYTES = 1 << 23


def cache_home() -> Path:
    """Directory for what can be made again: `NEXTLAT_CACHE`, else `nextlat_dist` in the user's cache directory."""
    given = os.environ.get("NEXTLAT_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextlat_dist"


class ShardChecker:
    """Checks shards of one storage; may be used by several threads.

    Args:
        verify: `always`: once per process; `first`: until it was found right, and again when it changes; of a remote
            storage, whose records are fetched one by one, only the size is checked; `never`.
    """

    def __init__(self, storage: Storage, verify: Verify) -> None:
        self._storage = storage
        self._verify = verify
        self._good: set[str] = set()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def problem(self, shard: ShardEntry) -> str | None:
        """What is wrong with the shard, for a sentence that begins with its name; None when nothing is.

        Raises:
            OSError: it cannot be read.
        """
        if self._verify == "never" or shard.name in self._good:
            return None
        if self._verify == "first" and self._is_remote(shard.name):
            return None
        with self._locks[shard.name]:
            if shard.name in self._good:
                return None
            right = self._right_by_stamp(shard) if self._verify == "first" else self._right(shard)
            if right:
                self._good.add(shard.name)
                return None
        return f"is not the file that the manifest describes: its sha256 differs{self.age(shard)}"

    def age(self, shard: ShardEntry) -> str:
        """A remark when the shard was changed after its index was written."""
        if self._is_remote(shard.name):
            return ""
        names = (shard.name, index_name(shard.name))
        try:
            changed, indexed = (Path(self._storage.full_name(name)).stat().st_mtime for name in names)
        except OSError:
            return ""
        return " (its index is older than the shard)" if changed > indexed else ""

    def _is_remote(self, name: str) -> bool:
        return "://" in self._storage.full_name(name)

    def _right_by_stamp(self, shard: ShardEntry) -> bool:
        key = hashlib.sha256(os.path.abspath(self._storage.full_name(shard.name)).encode()).hexdigest()
        expected = f"{self._storage.stamp(shard.name)} {shard.sha256}"
        directory = cache_home() / "verified"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory / key, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:  # without a cache directory every process checks for itself
            return self._right(shard)
        with os.fdopen(descriptor, "r+") as stamp:
            fcntl.flock(stamp, fcntl.LOCK_EX)
            if stamp.read() == expected:
                return True
            if not self._right(shard):
                return False
            stamp.seek(0)
            stamp.truncate()
            stamp.write(expected)
        return True

    def _right(self, shard: ShardEntry) -> bool:
        digest = hashlib.sha256()
        for offset in range(0, shard.bytes, CHUNK_BYTES):
            # No record has this crc32: a cache passes the bytes through.
            digest.update(self._storage.read_range(shard.name, offset, CHUNK_BYTES, -1))
        return digest.hexdigest() == shard.sha256
