"""The documents of a task's dataset, as its generator made them; every evaluation on a task reads them here.

    for document in documents(Path("data/path-star/test"), limit=1000): …

Invariant: what is handed out has the sha256 of its shard and the crc32 of its record checked, beliefs included.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nextlat_dist.data.members import split_members
from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import read_index, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.tasks import Document, task_of

BELIEFS_MEMBER = "beliefs.npy"


def documents(dataset: Path, limit: int | None) -> Iterator[Document]:
    """The first `limit` documents (None: all), in the order they were written.

    Labels and beliefs are there where the dataset has them; `content` is empty, since it is not stored.

    Raises:
        UserError: no dataset, not one of `nextlat-data task`, damaged, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of documents is {limit}, but must be ≥ 1; raise --documents")
    storage = open_storage(dataset)
    manifest = read_manifest(storage)
    task_of(manifest)
    records = Records(storage, manifest)
    ranges = [(shard.name, *row) for shard in manifest.shards for row in read_index(storage, shard).tolist()]
    left = manifest.documents if limit is None else limit
    for number, (shard, offset, length, _, _, crc32) in enumerate(ranges):
        record = records.read(number)
        beliefs = _beliefs(storage.read_range(shard, offset, length, crc32), crc32)
        if beliefs is not None and len(beliefs) != len(record.tokens):
            raise UserError(
                f"{records.describe(number)} has {len(record.tokens)} tokens, but the beliefs after {len(beliefs)}; "
                "write the data again with `nextlat-data task`"
            )
        for index, end in enumerate(record.ends[:left].tolist()):
            span = slice(end - int(record.lengths[index]), end)
            yield Document(
                tokens=record.tokens[span].astype(np.int64),
                prompt_tokens=0 if record.prompts is None else int(record.prompts[index]),
                content=b"",
                labels=None if record.labels is None else record.labels[span].astype(np.int64),
                beliefs=None if beliefs is None else beliefs[span],
            )
        left -= len(record.ends)
        if left <= 0:
            return


def _beliefs(data: bytes, crc32: int) -> np.ndarray | None:
    """float32 [tokens, states] of a record, None where it has none."""
    assert zlib.crc32(data) == crc32, "the record was changed since it was checked"
    member = split_members(data).get(BELIEFS_MEMBER)
    return None if member is None else np.lib.format.read_array(io.BytesIO(member), allow_pickle=False)
