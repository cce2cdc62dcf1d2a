"""Mix the documents of a dataset before they become records.

Neighbours in the input are often alike (the files of a folder, the pages of a site), and a record is a block of
neighbours: without this a batch would see little but one folder. The parts of the input are read in an order of their
own, and the documents are mixed in a buffer of the size of `BUFFER_TOKENS`.

Invariant: the order is a function of the documents, the seed and the place in the dataset alone, and a buffer never
reaches over the end of a shard; so an interrupted run resumes after its last finished shard with the same bytes.
"""

from __future__ import annotations

import zlib

from data_tools.shards.long_documents import Tokens
from data_tools.shards.writer import DatasetWriter
from nextlat_dist.data.order import permutation

# In memory, for each split: 67 MB for a vocabulary of up to 65,536 ids, else twice that.
BUFFER_TOKENS = 1 << 25
# A document that is held takes about 180 bytes besides its tokens: as much as so many tokens of two bytes.
DOCUMENT_TOKENS = 96


class ShuffledWriter:
    """Documents on their way into a dataset.

    Args:
        writer: gets the documents; must not end shards by itself.
        shard_tokens: a shard is closed as soon as it has this many tokens.
        seed: of the order; None keeps the documents as they come.
    """

    def __init__(self, writer: DatasetWriter, *, shard_tokens: int, seed: int | None) -> None:
        self._writer = writer
        self._shard_tokens = shard_tokens
        self._seed = seed
        self._documents: list[tuple[Tokens, int]] = []
        self._tokens = 0
        self._number = 0  # of the buffer in its shard

    def add(self, tokens: Tokens, prompt_tokens: int) -> bool:
        """Take a document; whether it finished a shard, so that nothing that was added is unfinished."""
        if self._seed is None:
            return self._writer.add(tokens, prompt_tokens)
        self._documents.append((tokens, prompt_tokens))
        self._tokens += len(tokens)
        is_whole = self._writer.unfinished_tokens + self._tokens >= self._shard_tokens
        if is_whole or self._tokens + DOCUMENT_TOKENS * len(self._documents) >= BUFFER_TOKENS:
            self._empty()
        if is_whole:
            self.flush()
        return is_whole

    def flush(self) -> None:
        """Write what is held back and finish the shard."""
        self._empty()
        self._writer.flush()
        self._number = 0

    def _empty(self) -> None:
        if not self._documents:
            return
        assert self._seed is not None
        key = (self._seed, zlib.crc32(self._writer.split.encode()), len(self._writer.shards), self._number)
        for number in permutation(len(self._documents), *key).tolist():
            self._writer.add(*self._documents[number])
        self._documents, self._tokens = [], 0
        self._number += 1
