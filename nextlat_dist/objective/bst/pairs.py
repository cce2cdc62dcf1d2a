"""The pairs of the Belief State Transformer: (t, j), f_t having read up to x_t and b_j from x_j on, in one document.

Which pairs there are, and which are drawn where `objective.pair_rate` is below 1, is a pure function of the rows and
their numbers in the stream: it depends neither on the layout nor on who asks. A pair counts for the next token if
x_{t+1} is a loss token, for the previous one if x_{j-1} is. Pairs that touch the document's end in the row are always
kept: decoding has no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.model.rows import Batch

AT_A_TIME = 4_000_000  # of places (t, j) among which pairs are looked for together
ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's (Steele et al. 2014)


@dataclass(frozen=True)
class Pairs:
    """Pairs of some rows, row by row.

    Attributes:
        row: in the batch [pairs].
        before: t [pairs].
        after: j - 1, the place of b_j among states of x_1 .. x_s [pairs].
        next_counts, previous_counts: [pairs].
    """

    row: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor
    next_counts: torch.Tensor
    previous_counts: torch.Tensor

    def __len__(self) -> int:
        return len(self.row)

    def split(self, size: int) -> Iterator[Pairs]:
        parts = (self.row, self.before, self.after, self.next_counts, self.previous_counts)
        for part in zip(*(one.split(size) for one in parts), strict=True):
            yield Pairs(*part)


def groups_of_rows(batch: Batch) -> Iterator[slice]:
    """Rows whose pairs are looked for together."""
    size = max(1, AT_A_TIME // batch.width**2)
    return (slice(start, min(start + size, len(batch))) for start in range(0, len(batch), size))


def pairs_of(batch: Batch, rows: slice, objective: ObjectiveConfig) -> Pairs:
    """Those of which something counts. On an accelerator the host waits for their number."""
    documents, loss_mask = batch.document_ids[rows], batch.loss_mask[rows]
    length = documents.shape[1] - 1
    t = torch.arange(length, device=documents.device)[:, None]
    j = torch.arange(1, length + 1, device=documents.device)[None]
    first, last = documents[:, :-1, None], documents[:, None, 1:]
    kept = (first == last) & (first >= 0) & (j - t >= objective.least_gap)
    drawn = torch.ones_like(kept)
    if objective.largest_gap is not None:
        drawn &= j - t <= objective.largest_gap
    if objective.pair_rate < 1:
        drawn &= uniform(batch.row_numbers[rows, None, None], t, j) < objective.pair_rate
    kept &= drawn | document_ends(documents)[:, None, 1:]
    # x_{t+1} lies in the document, since x_j does; x_{j-1} does, since x_t does.
    nexts, previous = loss_mask[:, 1:, None].expand_as(kept), loss_mask[:, None, :-1].expand_as(kept)
    found = (kept & (nexts | previous)).nonzero(as_tuple=True)
    row, before, after = found
    return Pairs(rows.start + row, before, after, nexts[found], previous[found])


def document_ends(documents: torch.Tensor) -> torch.Tensor:
    """Of document numbers [rows, s + 1]: whether the token is the last of its document in the row."""
    ends = documents >= 0
    ends[:, :-1] &= documents[:, :-1] != documents[:, 1:]
    return ends


def decoded_places(
    batch: Batch, rows: slice, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and positions t whose next token counts, in documents that end inside the row, and the place of the end's
    state: the very conditions of decoding, where nothing is known of what comes but that it ends. A place nearer to the
    end than any pair is does not count: what follows it is never learnt.
    """
    documents, loss_mask = batch.document_ids[rows], batch.loss_mask[rows]
    width = documents.shape[1]
    ends = document_ends(documents)
    ends[:, -1] = False  # who knows whether it goes on
    places = torch.arange(width, device=documents.device)
    # The first end at or after each token.
    end = torch.where(ends, places, width).flip(1).cummin(1).values.flip(1)
    same = (end < width) & (documents.gather(1, end.clamp(max=width - 1)) == documents) & (documents >= 0)
    counts = same[:, :-1] & loss_mask[:, 1:] & (documents[:, :-1] == documents[:, 1:])
    counts &= (end - places)[:, :-1] >= objective.least_gap
    row, at = counts.nonzero(as_tuple=True)
    return rows.start + row, at, end[row, at] - 1


def pair_counts(batch: Batch, objective: ObjectiveConfig) -> torch.Tensor:
    """How much enters each term: float64 [3]."""
    counts = torch.zeros(3, dtype=torch.float64, device=batch.message.device)
    for rows in groups_of_rows(batch):
        pairs = pairs_of(batch, rows, objective)
        counts[0] += pairs.next_counts.sum()
        counts[1] += pairs.previous_counts.sum()
        counts[2] += len(decoded_places(batch, rows, objective)[0])
    return counts


def uniform(number: torch.Tensor, t: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """A number in [0, 1) for each pair of a row of that number, by splitmix64 of the three: float64."""
    value = number.long()
    for part in (t, j):
        value = _mixed(value * _signed(ODD[0]) + part + 1)
    return ((value >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mixed(value: torch.Tensor) -> torch.Tensor:
    for shift, factor in ((30, ODD[1]), (27, ODD[2])):
        value = (value ^ _shifted(value, shift)) * _signed(factor)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as if the number had no sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
