"""Read single records of a sharded dataset by byte range, verified.

Invariant: every record handed out has the byte range and crc32 of the index and the counts written there; a shard that
is missing, cut short or altered is an error that names it, never a shorter epoch (a tar reader on its own silently ends
a damaged shard).
"""

from __future__ import annotations

import errno
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from nextlat_dist.data.integrity import ShardChecker, Verify
from nextlat_dist.data.members import read_tokenizer, record_decoder, split_members
from nextlat_dist.data.shard_format import INDEX_COLUMNS, Manifest, Record, ShardEntry, read_index
from nextlat_dist.data.storage.base import Storage
from nextlat_dist.errors import UserError

INDEX_READERS = 16


class DamagedRecord(UserError):
    """A record whose bytes are gone or are not those that were written. What may pass, such as a network that is down,
    is a plain UserError."""


class Records:
    """All records of one dataset, numbered 0, 1, 2… in shard order. `read` may be called from several threads.

    Args:
        verify: when to check the sha256 of whole shards (see `ShardChecker`).
        tolerant: open a dataset with missing, cut or altered shards too; reading what they lost raises DamagedRecord.

    Attributes:
        documents: int64 [records], documents of each record.
        tokens: int64 [records], tokens of each record.

    Raises:
        UserError: an index or shard is missing, or does not match the manifest.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, *, verify: Verify = "first", tolerant: bool = False
    ) -> None:
        self._storage = storage
        self._manifest = manifest
        # Where damage is tolerated, the crc32 of each record tells which ones are lost.
        self._checker = ShardChecker(storage, "never" if tolerant else verify)
        if not tolerant:
            self._check_sizes()
        with ThreadPoolExecutor(INDEX_READERS) as pool:
            tables = list(pool.map(partial(read_index, storage), manifest.shards))
        table = np.concatenate([np.empty((0, len(INDEX_COLUMNS)), np.int64), *tables])
        self._offset, self._length, self.documents, self.tokens, self._crc32 = np.ascontiguousarray(table.T)
        self._first_record = np.cumsum([0, *(shard.records for shard in manifest.shards)])
        tokenizer = read_tokenizer(storage, manifest) if manifest.members.kind == "text" else None
        self._decode = record_decoder(manifest, tokenizer)

    def _check_sizes(self) -> None:
        shards = self._manifest.shards
        try:
            sizes = self._storage.sizes([shard.name for shard in shards])
        except OSError as error:
            raise UserError(f"the shards of {self._storage.url} cannot be looked up ({error}); try again") from None
        for shard, size in zip(shards, sizes, strict=True):
            path = self._storage.full_name(shard.name)
            if size is None:
                raise UserError(f"shard {path} is missing; copy it or shard the data again")
            if size != shard.bytes:
                raise UserError(
                    f"shard {path} has {size} bytes where the manifest says {shard.bytes}{self._checker.age(shard)}; "
                    "copy the shard again, or write its index again with `nextlat-data index`"
                )

    def __len__(self) -> int:
        return len(self._offset)

    def read(self, record: int) -> Record:
        """The record with this number.

        Raises:
            DamagedRecord: its bytes differ from those written, naming shard, record and offset.
            UserError: its shard cannot be read, or is altered as a whole.
        """
        offset, length, crc32 = int(self._offset[record]), int(self._length[record]), int(self._crc32[record])
        shard = self._shard(record)
        described = self.describe(record)
        try:
            problem = self._checker.problem(shard)
            data = self._storage.read_range(shard.name, offset, length, crc32)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
                raise DamagedRecord(
                    f"{described} cannot be read ({error.strerror or error}); copy the shard again"
                ) from None
            raise UserError(
                f"{described} cannot be read ({error.strerror or error}); repair the access and start again: a run "
                "resumes from its last checkpoint"
            ) from None
        if len(data) != length or zlib.crc32(data) != crc32:
            raise DamagedRecord(
                f"{described} is damaged: its crc32 is not the one in the index{self._checker.age(shard)}; copy the "
                "shard again"
            )
        if problem is not None:
            raise UserError(
                f"shard {self._storage.full_name(shard.name)} {problem}; copy the shard again, or write its index "
                "again with `nextlat-data index`"
            )
        try:
            decoded = self._decode(split_members(data))
        except ValueError as error:
            raise UserError(f"{described} is not what its manifest says: {error}; shard the data again") from None
        if len(decoded.tokens) != self.tokens[record] or len(decoded.ends) != self.documents[record]:
            raise UserError(f"{described} does not hold the tokens and documents of the index; shard the data again")
        return decoded

    def _shard(self, record: int) -> ShardEntry:
        return self._manifest.shards[int(np.searchsorted(self._first_record, record, side="right")) - 1]

    def describe(self, record: int) -> str:
        """Number, offset and shard of a record, for messages."""
        shard = int(np.searchsorted(self._first_record, record, side="right")) - 1
        path = self._storage.full_name(self._manifest.shards[shard].name)
        return f"record {record - self._first_record[shard]} at offset {self._offset[record]} of shard {path}"
