"""Measures how far ahead hidden states look: linear probes for later tokens against a GPT twin's, and effective rank.

    evaluate_probes(exports: ["gpt=DIR", "nextlat=DIR", …], data: Path, *, baseline=None, offsets=range(1, 21),
                    sequences=1024, length=256, fitting=Fitting(), progress=True) -> Report

Works on any text dataset. A difference below 0 means that the states of that model say more about the token so far
ahead than the baseline's do. Exports of one name are runs (seeds) of it: their losses are averaged. The effective rank
is that of all states of the first 256 sequences of 256 tokens, or of as many and as long ones as there are, and the
table says of how many.

Command: `nextlat evaluate probes --export gpt=DIR nextlat=DIR --data data/text/validation --json FILE --pictures DIR`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.effective_rank import effective_rank, effective_rank_of_logits
from nextlat_dist.evaluation.exports import named_exports
from nextlat_dist.evaluation.probes.linear_probes import (
    Fitting,
    Sequences,
    difference,
    no_state_losses,
    pair_counts,
    probe_losses,
    read_sequences,
)
from nextlat_dist.evaluation.probes.page import NO_STATE, ProbeRow, Ranks, probes_report
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.reporting.console import Progress
from nextlat_dist.reporting.report import Report

OFFSETS = tuple(range(1, 21))
RANK_SEQUENCES, RANK_LENGTH = 256, 256  # of the effective rank in arXiv 2511.05963


def evaluate_probes(
    exports: Sequence[str],
    data: Path,
    *,
    baseline: str | None = None,
    offsets: Sequence[int] = OFFSETS,
    sequences: int = 1024,
    length: int = RANK_LENGTH,
    fitting: Fitting | None = None,
    progress: bool = True,
) -> Report:
    """Fit and judge the probes of every export.

    Args:
        exports: `[name=]DIR` each, written by `nextlat export`; see `evaluation.exports`.
        data: a dataset that no export was trained on, such as a validation split.
        baseline: the name that differences are to; None: the first.
        sequences: documents read, half to fit the probes and half to judge them.
        length: tokens of each, at most.

    Raises:
        UserError: bad options or data, or an export that does not know the tokens of the dataset.
    """
    named = named_exports(exports)
    names = list(dict.fromkeys(export.name for export in named))
    baseline = names[0] if baseline is None else baseline
    fitting = Fitting() if fitting is None else fitting
    if baseline not in names:
        raise UserError(f"--baseline is {baseline!r}, but the exports are called {', '.join(names)}; name one of them")
    if min(offsets, default=0) < 1 or sequences < 4 or min(fitting.steps, fitting.batch) < 1:
        raise UserError(
            f"--offsets are {list(offsets)}, --sequences {sequences} and --steps {fitting.steps}, but there must be "
            "offsets ≥ 1, 4 sequences and 1 step or more; change what is less"
        )
    read = read_sequences(data, sequences, length)
    farthest = max(offsets)
    if any(len(read.pairs(farthest, judged=judged)) == 0 for judged in (False, True)):
        raise UserError(
            f"no pair of tokens {farthest} apart is in the first {read.tokens.shape[1]} tokens of the documents of "
            f"{data}; lower --offsets or raise --length"
        )
    vocab_size = read_manifest(open_storage(data)).tokenizer.vocab_size
    losses: dict[str, list[list[Tensor]]] = {name: [] for name in names}  # name → run → offset → [documents]
    ranks: dict[str, list[float]] = {name: [] for name in names}
    of_logits: dict[str, list[float]] = {name: [] for name in names}
    for export in named:
        model = ExportModel(export.path)
        if model.vocab_size < vocab_size:
            raise UserError(
                f"{export.path} knows {model.vocab_size} token ids, but {data} has {vocab_size}; give data of its "
                "tokenizer"
            )
        watch = Progress(f"{export.name} {export.run}, probes", len(offsets), progress)
        own, rank, logits_rank = _probe(model, read, offsets, vocab_size, fitting, watch)
        losses[export.name].append(own)
        ranks[export.name].append(rank)
        of_logits[export.name].append(logits_rank)
    of_rank = read.first(RANK_SEQUENCES)
    options = {"baseline": baseline, "offsets": list(offsets), "sequences": len(read.lengths), "length": length}
    options |= {"steps": fitting.steps, "batch": fitting.batch, "seed": fitting.seed}
    found = Ranks(ranks, of_logits, states=int(of_rank.lengths.sum()), sequences=len(of_rank.lengths))
    return probes_report(options, _rows(losses, baseline, read, offsets, vocab_size), found, baseline)


def _probe(
    model: ExportModel,
    sequences: Sequences,
    offsets: Sequence[int],
    vocab_size: int,
    fitting: Fitting,
    watch: Progress,
) -> tuple[list[Tensor], float, float]:
    """Losses of the judged documents by offset, and the effective ranks of states and of logits."""
    states = model.states(sequences.tokens).clone()  # no longer an inference tensor: heads are fitted on it
    first = sequences.first(RANK_SEQUENCES)
    of_rank = states[: len(first.lengths)][first.real()]
    rank, logits_rank = effective_rank(of_rank), effective_rank_of_logits(of_rank, model.head_weight)
    losses = []
    for offset in offsets:
        losses.append(probe_losses(states, sequences, offset, vocab_size, fitting))
        watch.add(fitting.steps * fitting.batch)
    return losses, rank, logits_rank


def _rows(
    losses: Mapping[str, Sequence[Sequence[Tensor]]],
    baseline: str,
    sequences: Sequences,
    offsets: Sequence[int],
    vocab_size: int,
) -> list[ProbeRow]:
    """By offset and name; the losses of the runs of a name are averaged document by document."""
    rows: list[ProbeRow] = []
    for index, offset in enumerate(offsets):
        counts = pair_counts(sequences, offset)
        nats = {name: torch.stack([run[index] for run in runs]).mean(dim=0) for name, runs in losses.items()}
        for name, own in nats.items():
            apart, error = difference(own, nats[baseline], counts)
            rows.append(ProbeRow(name, offset, float(own.sum() / counts.sum()), apart, error))
        blind = float(no_state_losses(sequences, offset, vocab_size).sum() / counts.sum())
        rows.append(ProbeRow(NO_STATE, offset, blind, None, None))
    return rows
