"""Linear probes for the tokens to come: a linear head on frozen h_t for x_{t+k}, one for every offset k.

    read_sequences(dataset: Path, count: int, length: int) -> Sequences
    probe_losses(states: Tensor, sequences: Sequences, offset: int, vocab_size: int, fitting: Fitting) -> Tensor

Sequences are the beginnings of documents, so nothing is asked of a model that its training did not show it. Heads are
fitted on every other document and judged on those between. Invariant: documents, their order and the batches of every
step depend on the seed alone, so that the losses of two models may be compared document by document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Record, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError

LR_TIMES_HIDDEN = 0.5  # a step of Adam moves a logit by less than that, whatever the width
JUDGED_ROWS = 4096  # positions whose logits are in memory together


@dataclass(frozen=True)
class Sequences:
    """Attributes:
    tokens: int64 [n, length], 0 after the end of a document.
    lengths: int64 [n].
    """

    tokens: Tensor
    lengths: Tensor

    def real(self) -> Tensor:
        """bool [n, length]: which positions hold a token of the document."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def first(self, count: int) -> Sequences:
        return Sequences(self.tokens[:count], self.lengths[:count])

    def pairs(self, offset: int, *, judged: bool) -> Tensor:
        """int64 [pairs, 2]: sequence and position t of every pair (t, t + offset) in the documents of one half."""
        has_target = self.real()[:, offset:].clone()
        has_target[int(not judged) :: 2] = False
        return has_target.nonzero()


@dataclass(frozen=True)
class Fitting:
    """Adam on mini-batches, its learning rate falling to 0."""

    steps: int = 300
    batch: int = 512
    seed: int = 0


def read_sequences(dataset: Path, count: int, length: int) -> Sequences:
    """The first `length` tokens of the first `count` documents that have at least two; fewer where there are fewer.

    Raises:
        UserError: no dataset, or a damaged one, or it has fewer than four such documents.
    """
    storage = open_storage(dataset)
    records = Records(storage, read_manifest(storage))
    starts: list[np.ndarray] = []
    for number in range(len(records)):
        starts += [start for start in _starts(records.read(number), length) if len(start) > 1]
        if len(starts) >= count:
            break
    starts = starts[:count]
    if len(starts) < 4:
        raise UserError(
            f"{dataset} has {len(starts)} documents of two tokens or more, but probes need 4 to fit and to judge; "
            "raise --sequences or give a larger dataset as --data"
        )
    tokens = torch.zeros(len(starts), max(map(len, starts)), dtype=torch.int64)
    for row, start in enumerate(starts):
        tokens[row, : len(start)] = torch.from_numpy(start.astype(np.int64))
    return Sequences(tokens, torch.tensor([len(start) for start in starts]))


def _starts(record: Record, length: int) -> Iterator[np.ndarray]:
    for end, size in zip(record.ends.tolist(), record.lengths.tolist(), strict=True):
        yield record.tokens[end - size : min(end, end - size + length)]


def probe_losses(states: Tensor, sequences: Sequences, offset: int, vocab_size: int, fitting: Fitting) -> Tensor:
    """Fit the head of one offset; nats of each judged document, all its pairs together: float64 [n // 2].

    Args:
        states: h [n, length, hidden] of the sequences, on any device.
    """
    fit, judged = sequences.pairs(offset, judged=False), sequences.pairs(offset, judged=True)
    targets = sequences.tokens[:, offset:]
    hidden, device = states.shape[-1], states.device
    known = states[fit[:, 0], fit[:, 1]].float()
    mean, spread = known.mean(dim=0), known.std(dim=0)
    spread = torch.where(spread > 0, spread, 1.0)
    weight = torch.zeros(vocab_size, hidden, device=device, requires_grad=True)
    bias = log_frequencies(targets[fit[:, 0], fit[:, 1]], vocab_size).to(device).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=LR_TIMES_HIDDEN / hidden)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=fitting.steps)
    generator = torch.Generator().manual_seed(fitting.seed + offset)
    for _ in range(fitting.steps):
        row, t = fit[torch.randint(len(fit), (fitting.batch,), generator=generator)].unbind(dim=1)
        x = (states[row, t].float() - mean) / spread
        loss = functional.cross_entropy(functional.linear(x, weight, bias), targets[row, t].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    sums = torch.zeros(len(sequences.lengths), dtype=torch.float64)
    with torch.no_grad():
        for row, t in (part.unbind(dim=1) for part in judged.split(JUDGED_ROWS)):
            logits = functional.linear((states[row, t].float() - mean) / spread, weight, bias)
            nats = functional.cross_entropy(logits, targets[row, t].to(device), reduction="none")
            sums.index_add_(0, row, nats.double().cpu())
    return sums[1::2]


def log_frequencies(tokens: Tensor, vocab_size: int) -> Tensor:
    """ln of how often each id is among `tokens`, one added to every count: float32 [vocab_size]."""
    counts = torch.bincount(tokens, minlength=vocab_size).float() + 1
    return (counts / counts.sum()).log()


def no_state_losses(sequences: Sequences, offset: int, vocab_size: int) -> Tensor:
    """As `probe_losses`, of a head that sees no state: the frequencies of the tokens alone. Probes should be below."""
    fit, judged = sequences.pairs(offset, judged=False), sequences.pairs(offset, judged=True)
    targets = sequences.tokens[:, offset:]
    log_probability = log_frequencies(targets[fit[:, 0], fit[:, 1]], vocab_size)
    sums = torch.zeros(len(sequences.lengths), dtype=torch.float64)
    sums.index_add_(0, judged[:, 0], -log_probability[targets[judged[:, 0], judged[:, 1]]].double())
    return sums[1::2]


def pair_counts(sequences: Sequences, offset: int) -> Tensor:
    """int64 [n // 2]: pairs of each judged document."""
    return (sequences.lengths[1::2] - offset).clamp(min=0)


def difference(nats: Tensor, baseline: Tensor, counts: Tensor) -> tuple[float, float]:
    """Nats per pair above the baseline's, and the standard error of that over documents; [documents] each."""
    apart = nats - baseline
    total = counts.sum()
    mean = apart.sum() / total
    documents = len(apart)
    residuals = apart - mean * counts
    error = (residuals.square().sum() * documents / (documents - 1)).sqrt() / total
    return float(mean), float(error)
