"""Read single records of a sharded dataset by byte range, verified.

Invariant: every record handed out has the byte range and crc32 of the index and the counts written there; a shard that
is missing, cut short or altered is an error with its place, never a shorter epoch. WebDataset's own tar iterator parses
the byte range (on its own it would end a damaged shard in silence).
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np

from nextlat_dist.data.shard_format import Manifest, Record, read_index
from nextlat_dist.errors import UserError


class Storage:
    """All records of one dataset, numbered 0, 1, 2… in shard order.

    Attributes:
        documents: int64 [records], documents of each record.
        tokens: int64 [records], tokens of each record.

    Raises:
        UserError: an index or shard is missing, or does not match the manifest.
    """

    def __init__(self, dataset: Path, manifest: Manifest) -> None:
        self._dataset = dataset
        self._manifest = manifest
        self._keys: list[str] = []
        columns: list[np.ndarray] = [np.empty((0, 5), np.int64)]
        for shard in manifest.shards:
            self._check_size(shard.name, shard.bytes)
            rows = read_index(dataset, shard)
            self._keys += [row[0] for row in rows]
            columns.append(np.array([row[1:] for row in rows], dtype=np.int64))
        table = np.concatenate(columns)
        self._offset, self._length, self.documents, self.tokens, self._crc32 = np.ascontiguousarray(table.T)
        self._shard = np.repeat(np.arange(len(manifest.shards)), [shard.records for shard in manifest.shards])
        assert len(self._shard) == len(self._keys)

    def _check_size(self, name: str, expected: int) -> None:
        path = self._dataset / name
        if not path.is_file():
            raise UserError(f"shard {path} is missing; copy it or shard the data again")
        if path.stat().st_size != expected:
            raise UserError(
                f"shard {path} has {path.stat().st_size} bytes where the manifest says {expected}; "
                "copy it or shard the data again"
            )

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, record: int) -> Record:
        """The record with this number.

        Raises:
            UserError: its bytes cannot be read or differ from those written, naming shard, record and offset; or it
                holds a token id that its tokenizer does not have.
        """
        path = self._dataset / self._manifest.shards[self._shard[record]].name
        offset, length = int(self._offset[record]), int(self._length[record])
        place = f"record {self._keys[record]} at offset {offset} of shard {path}"
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(length)
        except OSError as error:
            raise UserError(f"{place} cannot be read ({error.strerror}); copy the shard again") from error
        if len(data) != length or zlib.crc32(data) != self._crc32[record]:
            raise UserError(f"{place} is damaged: its crc32 is not the one in the index; copy the shard again")
        decoded = _decode(data)
        if len(decoded.tokens) != self.tokens[record] or len(decoded.ends) != self.documents[record]:
            raise UserError(f"{place} does not hold the tokens and documents of the index; shard the data again")
        return decoded

    def place(self, record: int) -> str:
        """Key and shard of a record, for messages."""
        return f"record {self._keys[record]} of shard {self._manifest.shards[self._shard[record]].name}"


def _decode(data: bytes) -> Record:
    # Imported here because the package imports torch where torch is installed.
    from webdataset.tariterators import base_plus_ext, tar_file_iterator

    return Record.from_members({base_plus_ext(m["fname"])[1]: m["data"] for m in tar_file_iterator(io.BytesIO(data))})
