"""How far ahead hidden states look: linear probes for the tokens to come against a GPT twin's, and effective rank.

    evaluate_probes(exports: ["gpt=DIR", "nextlat=DIR", …], data: Path, *, baseline=None, offsets=range(1, 21),
                    sequences=1024, length=256, fitting=Fitting(), json_path=None, picture_dir=None,
                    progress=True) -> dict

Works on any text dataset. A number below 0 means that the states of that model say more about the token so far ahead
than the baseline's do. Exports of one name are runs (seeds) of it: their losses are averaged. The effective rank is
that of all states of the first 256 sequences of 256 tokens, or of as many and as long ones as there are, and the table
says of how many.

Command: `nextlat evaluate probes --export gpt=DIR nextlat=DIR --data data/text/validation --json FILE --pictures DIR`.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nextlat_dist.data.shard_format import read_manifest
from nextlat_dist.data.storage.open import open_place
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.effective_rank import effective_rank
from nextlat_dist.evaluation.exports import named_exports
from nextlat_dist.evaluation.probes.measure import (
    Fitting,
    Sequences,
    difference,
    no_state_losses,
    pair_counts,
    probe_losses,
    read_sequences,
)
from nextlat_dist.evaluation.state_model import Latents
from nextlat_dist.reporting import pictures, report

COMMAND = "nextlat evaluate probes"
OFFSETS = tuple(range(1, 21))
NO_STATE = "no_state"  # the head that sees none
RANK_SEQUENCES, RANK_LENGTH = 256, 256  # of the paper's effective rank


def evaluate_probes(
    exports: Sequence[str],
    data: Path,
    *,
    baseline: str | None = None,
    offsets: Sequence[int] = OFFSETS,
    sequences: int = 1024,
    length: int = RANK_LENGTH,
    fitting: Fitting | None = None,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Probe, print the table, write JSON and a picture where asked, and return the content of the JSON.

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
    vocab_size = read_manifest(open_place(data)).tokenizer.vocab_size
    losses: dict[str, list[list[Tensor]]] = {name: [] for name in names}  # name → run → offset → [documents]
    ranks: dict[str, list[float]] = {name: [] for name in names}
    for export in named:
        watch = report.Progress(f"{export.name} {export.run}, probes", len(offsets), progress)
        own, rank = _probe(export.path, data, read, offsets, vocab_size, fitting, watch)
        losses[export.name].append(own)
        ranks[export.name].append(rank)
    rows = _rows(losses, baseline, read, offsets, vocab_size)
    summary: dict[str, float] = {f"{name}_effective_rank": statistics.mean(ranks[name]) for name in names}
    for row in rows:
        summary[f"{row['export']}_loss_{row['offset']}"] = row["loss"]
        if row["difference"] is not None and row["export"] != baseline:
            summary[f"{row['export']}_difference_{row['offset']}"] = row["difference"]
    of_rank = read.first(RANK_SEQUENCES)
    summary["effective_rank_states"] = int(of_rank.lengths.sum())
    described = {"baseline": baseline, "offsets": list(offsets), "sequences": len(read.lengths), "length": length}
    described |= {"steps": fitting.steps, "batch": fitting.batch, "seed": fitting.seed}
    content = report.envelope(COMMAND, described, summary, rows) | {"effective_ranks": ranks}
    print(_tables(rows, ranks, baseline, of_rank))
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        _draw(rows, baseline, picture_dir / "probes_by_offset.png")
    return content


def _probe(
    export: Path,
    data: Path,
    sequences: Sequences,
    offsets: Sequence[int],
    vocab_size: int,
    fitting: Fitting,
    watch: report.Progress,
) -> tuple[list[Tensor], float]:
    """Losses of the judged documents by offset, and the effective rank."""
    latents = Latents(export)
    if latents.vocab_size < vocab_size:
        raise UserError(
            f"{export} knows {latents.vocab_size} token ids, but {data} has {vocab_size}; give data of its tokenizer"
        )
    states = latents.states(sequences.tokens).clone()  # no longer an inference tensor: heads are fitted on it
    first = sequences.first(RANK_SEQUENCES)
    rank = effective_rank(states[: len(first.lengths)][first.real()])
    losses = []
    for offset in offsets:
        losses.append(probe_losses(states, sequences, offset, vocab_size, fitting))
        watch.add(fitting.steps * fitting.batch)
    return losses, rank


def _rows(
    losses: Mapping[str, Sequence[Sequence[Tensor]]],
    baseline: str,
    sequences: Sequences,
    offsets: Sequence[int],
    vocab_size: int,
) -> list[dict[str, Any]]:
    """By name and offset, in nats per token; `no_state` is the head that sees none."""
    rows: list[dict[str, Any]] = []
    for place, offset in enumerate(offsets):
        counts = pair_counts(sequences, offset)
        nats = {name: torch.stack([run[place] for run in runs]).mean(dim=0) for name, runs in losses.items()}
        for name, own in nats.items():
            apart, error = difference(own, nats[baseline], counts)
            fields = {"difference": apart, "difference_stderr": error}
            rows.append({"export": name, "offset": offset, "loss": float(own.sum() / counts.sum()), **fields})
        blind = float(no_state_losses(sequences, offset, vocab_size).sum() / counts.sum())
        blank = {"difference": None, "difference_stderr": None}
        rows.append({"export": NO_STATE, "offset": offset, "loss": blind, **blank})
    return rows


def _tables(
    rows: Sequence[Mapping[str, Any]], ranks: Mapping[str, Sequence[float]], baseline: str, of_rank: Sequences
) -> str:
    columns, lines = {"offset": "{offset}"}, {row["offset"]: {"offset": row["offset"]} for row in rows}
    for place, name in enumerate(dict.fromkeys(row["export"] for row in rows)):
        columns[name.replace("_", " ")] = f"{{loss{place}}}"
        compared = name not in (baseline, NO_STATE)
        if compared:
            columns[f"{name} - {baseline}"] = f"{{difference{place}}}"
        for row in (row for row in rows if row["export"] == name):
            line = lines[row["offset"]]
            line[f"loss{place}"] = f"{row['loss']:.4f}"
            if compared:
                line[f"difference{place}"] = f"{row['difference']:+.4f} ± {row['difference_stderr']:.4f}"
    found = ", ".join(f"{name} {' '.join(f'{rank:.1f}' for rank in own)}" for name, own in ranks.items())
    count, states = len(of_rank.lengths), int(of_rank.lengths.sum())
    return (
        f"{report.table(columns, list(lines.values()))}\n"
        "nats per token of a linear head on h_t for the token so far ahead; ± one standard error over documents\n"
        f"effective rank of {states:,} states ({count} sequences; the paper: 256 of 256): {found}"
    )


def _draw(rows: Sequence[Mapping[str, Any]], baseline: str, path: Path) -> None:
    figure, (losses, apart) = pictures.panels(2, "Linear probes on frozen hidden states")
    for index, name in enumerate(dict.fromkeys(row["export"] for row in rows)):
        own = [row for row in rows if row["export"] == name]
        offsets = [row["offset"] for row in own]
        blind = name == NO_STATE
        style = {"color": "black", "linestyle": ":"} if blind else {"color": pictures.COLORS[index % 6], "marker": "o"}
        losses.plot(offsets, [row["loss"] for row in own], label=name.replace("_", " "), markersize=3.5, **style)
        if not blind:
            errors = [row["difference_stderr"] for row in own]
            apart.errorbar(offsets, [row["difference"] for row in own], errors, markersize=3.5, **style)
    losses.set(xlabel="offset (tokens ahead)", ylabel="held-out loss (nats per token)")
    apart.set(xlabel="offset (tokens ahead)", ylabel=f"loss above that of {baseline} (nats per token)")
    for axis in (losses, apart):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.legend(frameon=False)
    pictures.save_picture(figure, path)
