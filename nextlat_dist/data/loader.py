"""Batches of rows from a sharded dataset, resumable to the row on any number of data-parallel ranks.

Invariant: global batch n is a pure function of (manifest, seed, packing, sequence_length, n · global_batch_size). A
rank takes its slice of it; neither the number of ranks nor where a run was cut changes any batch. A resume seeks, it
never replays.

    loader = RowLoader(Path("data/train"), sequence_length=512, packing="concat", global_batch_size=32, seed=0,
                       shuffle=True, data_parallel_rank=0, data_parallel_size=1)
    batch = loader.next_batch()
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nextlat_dist.data.order import GlobalOrder, Span
from nextlat_dist.data.packing import Block, RowBatch, arrange, concat_rows, pad_rows
from nextlat_dist.data.places import open_place
from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage import Storage
from nextlat_dist.errors import UserError

__all__ = ["Cursor", "RowBatch", "RowLoader"]

CACHED_BLOCKS = 16


@dataclass(frozen=True)
class Cursor:
    """Place in the stream of global rows: `row` is the number of rows that all ranks together have taken."""

    row: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, int]) -> Cursor:
        return cls(row=int(raw["row"]))


class RowLoader:
    """This rank's slice of the endless stream of global batches.

    Args:
        dataset: directory with `manifest.json`.
        sequence_length: predicted positions per row; a row holds `sequence_length + 1` tokens.
        packing: "concat" cuts the token stream into full rows, epoch after epoch without a gap; "pad" gives every
            document its own row, padded or cut to length.
        global_batch_size: rows of a global batch; divisible by `data_parallel_size`.
        seed: of the order; used with `shuffle` only.
        shuffle: permute records over the dataset and documents inside records, anew every epoch.
        cursor: where to go on.
        vocab_size: of the model; every token id must be below it.
        tokenizer_sha256: of the tokenizer that the dataset must have been made with.

    Attributes:
        truncated_documents: documents this loader had to cut (`packing: pad`).

    Raises:
        UserError: the dataset is missing, damaged, empty or not made for this tokenizer or vocabulary; bad batch
            arithmetic.
    """

    def __init__(
        self,
        dataset: Path,
        *,
        sequence_length: int,
        packing: Literal["concat", "pad"],
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        data_parallel_rank: int,
        data_parallel_size: int,
        cursor: Cursor = Cursor(),
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size
        if sequence_length < 1:
            raise UserError(f"sequence_length is {sequence_length}; it must be at least 1")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        if packing not in ("concat", "pad"):
            raise UserError(f"packing is {packing!r}; it must be 'concat' or 'pad'")
        if global_batch_size < 1 or global_batch_size % data_parallel_size:
            raise UserError(
                f"global_batch_size {global_batch_size} is not divisible by the data-parallel size {data_parallel_size}"
                "; change global_batch_size or the number of ranks"
            )
        place = open_place(dataset)
        self._manifest = read_manifest(place)
        self._check_tokenizer(dataset, vocab_size, tokenizer_sha256)
        self._vocab_size = vocab_size or self._manifest.tokenizer.vocab_size
        self._storage = Storage(place, self._manifest)
        self._row_tokens = sequence_length + 1
        self._packing = packing
        self._batch_rows = global_batch_size
        self._rank_rows = global_batch_size // data_parallel_size
        self._rank = data_parallel_rank
        self._row = cursor.row
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()
        self.truncated_documents = 0
        if not self.rows_per_epoch:
            raise UserError(
                f"dataset {dataset} has {self._manifest.tokens} tokens in {self._manifest.documents} documents, too "
                f"few for one row of sequence_length + 1 = {self._row_tokens} tokens; use more data or a smaller "
                "sequence_length"
            )
        units = self._storage.tokens if packing == "concat" else self._storage.documents
        self._order = GlobalOrder(units, seed=seed, shuffle=shuffle)

    def _check_tokenizer(self, dataset: Path, vocab_size: int | None, sha256: str | None) -> None:
        tokenizer = self._manifest.tokenizer
        if sha256 is not None and sha256 != tokenizer.sha256:
            raise UserError(
                f"dataset {dataset} was made with tokenizer {tokenizer.sha256[:12]}…, not with {sha256[:12]}…; "
                "shard it again with this tokenizer or train with the dataset's own"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer of dataset {dataset} has {tokenizer.vocab_size} ids, but the model's vocab_size is "
                f"{vocab_size}; set vocab_size to at least {tokenizer.vocab_size}"
            )

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    @property
    def cursor(self) -> Cursor:
        """Where the next global batch begins."""
        return Cursor(self._row)

    @property
    def rows_per_epoch(self) -> int:
        """Full rows of one pass over the dataset (`concat`: the rest of an epoch flows into the next one)."""
        concat = self._packing == "concat"
        return self._manifest.tokens // self._row_tokens if concat else self._manifest.documents

    def next_batch(self) -> RowBatch:
        """Rows `[r · B/dp, (r + 1) · B/dp)` of the next global batch of B rows, for data-parallel rank r of dp.

        Raises:
            UserError: a record is damaged or holds a token id outside the vocabulary; the cursor then stays where it
                was.
        """
        first = self._row + self._rank * self._rank_rows
        if self._packing == "concat":
            pieces = self._pieces(first * self._row_tokens, (first + self._rank_rows) * self._row_tokens)
            batch = concat_rows(pieces, self._row_tokens)
        else:
            pieces = self._pieces(first, first + self._rank_rows)
            batch, truncated = pad_rows(pieces, self._row_tokens, max(self._manifest.tokenizer.pad_id, 0))
            self.truncated_documents += truncated
        self._row += self._batch_rows
        return batch

    def _pieces(self, begin: int, end: int) -> list[tuple[Block, int, int]]:
        return [(self._block(span), span.begin, span.end) for span in self._order.spans(begin, end)]

    def _block(self, span: Span) -> Block:
        """The record of a span, arranged for its epoch; the last few are kept, since rows end inside records."""
        key = (span.epoch, span.record)
        if key not in self._blocks:
            record = self._storage.read(span.record)
            largest = int(record.tokens.max())
            if largest >= self._vocab_size:
                raise UserError(
                    f"{self._storage.place(span.record)} holds token id {largest}, but the vocabulary has "
                    f"{self._vocab_size} ids; set vocab_size to the tokenizer's or shard the data again"
                )
            order = self._order.documents(span.epoch, span.record, len(record.ends))
            self._blocks[key] = arrange(record, order)
            if len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key]
