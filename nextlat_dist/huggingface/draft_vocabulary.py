"""The reduced draft vocabulary: the most frequent token ids of the training data.

A draft step costs one pass over the output head, which for a small model with a large vocabulary is most of it. Drafts
may come from fewer ids: whatever they come from, verification keeps the base model's own distribution, and an id that
is never drafted is still written when the base model picks it. Counting is deterministic: the same data and settings
give the same ids.

Command: `nextlat export … --draft-vocabulary N`, or `nextlat calibrate … --draft-vocabulary N --data DATASET`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import RowLoader, Source
from nextlat_dist.errors import UserError

COUNTED_TOKENS = 20_000_000  # the order of the frequent ids has settled long before
_BATCH_TOKENS = 1 << 16
_DATASET_ROW_TOKENS = 1024


@dataclass(frozen=True)
class TokenCounts:
    """How often each id occurs, int64 [vocab], and the ids that every draft vocabulary holds (EOS)."""

    counts: np.ndarray
    always: frozenset[int]


def count_run_data(config: RunConfig) -> TokenCounts:
    """Counts of the stream that the run of `config` trained on: its sources, weights, order, up to `COUNTED_TOKENS`.

    Raises:
        UserError: the training data is gone or damaged.
    """
    data = config.data
    batch = max(1, _BATCH_TOKENS // data.sequence_length)
    loader = RowLoader(
        [Source(source.name, source.path, source.weight) for source in data.train_sources],
        sequence_length=data.sequence_length,
        packing=data.packing,
        global_batch_size=batch,
        seed=config.training.seed,
        shuffle=data.shuffle,
        data_parallel_rank=0,
        data_parallel_size=1,
        weight_changes=data.weight_changes_by_row,
        shuffle_window_records=data.shuffle_window_records,
        vocab_size=config.model.vocab_size,
    )
    rows = min(config.total_steps * config.training.global_batch_size, -(-COUNTED_TOKENS // data.sequence_length))
    return _count(loader, batch, rows, config.model.vocab_size)


def count_dataset(dataset: Path | str, vocab_size: int) -> TokenCounts:
    """Counts of one pass over a dataset in stored order, up to `COUNTED_TOKENS`.

    Raises:
        UserError: no dataset, a damaged one, or one with ids beyond `vocab_size`.
    """
    batch = _BATCH_TOKENS // _DATASET_ROW_TOKENS
    loader = RowLoader(
        dataset,
        sequence_length=_DATASET_ROW_TOKENS - 1,
        packing="concat",
        global_batch_size=batch,
        seed=0,
        shuffle=False,
        data_parallel_rank=0,
        data_parallel_size=1,
        vocab_size=vocab_size,
    )
    rows = min(loader.rows_per_epoch, COUNTED_TOKENS // _DATASET_ROW_TOKENS)
    return _count(loader, batch, rows, vocab_size)


def _count(loader: RowLoader, batch_rows: int, rows: int, vocab_size: int) -> TokenCounts:
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, rows, batch_rows):
        batch = loader.next_batch()
        tokens, real = batch.tokens[: rows - first], batch.document_ids[: rows - first] >= 0  # padding is no token
        counts += np.bincount(tokens[real], minlength=vocab_size)
    eos = {manifest.tokenizer.eos_id for manifest in loader.manifests.values()}
    return TokenCounts(counts, frozenset(eos - {-1}))


def most_frequent(counted: TokenCounts, size: int) -> torch.Tensor:
    """int64 [size], ascending: the ids that must be there and the most frequent others (ties: the lower id).

    Raises:
        UserError: a size that reduces nothing or holds less than two ids.
    """
    check_size(size, len(counted.counts))
    ranked = counted.counts.copy()
    ranked[list(counted.always)] = np.iinfo(np.int64).max
    order = np.argsort(-ranked, kind="stable")
    return torch.from_numpy(np.sort(order[:size]))


def check_size(size: int, vocab_size: int) -> None:
    if not 2 <= size < vocab_size:
        raise UserError(
            f"draft_vocabulary is {size}, but must be at least 2 and less than the vocabulary of {vocab_size} ids "
            "(0: all of them); change --draft-vocabulary"
        )


def coverage(counted: TokenCounts, ids: Sequence[int] | torch.Tensor) -> float:
    """The share of the counted tokens that the draft vocabulary holds."""
    return float(counted.counts[np.asarray(ids)].sum() / max(counted.counts.sum(), 1))
