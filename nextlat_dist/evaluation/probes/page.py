"""The report of the probes: the table, the JSON and the picture, from losses by name and offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextlat_dist.reporting.pictures import COLORS, panels
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.runs import over_runs
from nextlat_dist.reporting.tables import table

COMMAND = "nextlat evaluate probes"
PICTURE = "probes_by_offset.png"
NO_STATE = "no_state"  # the head that sees no state: frequencies of tokens alone


@dataclass(frozen=True)
class ProbeRow:
    """Attributes:
    export: the name, or `no_state`.
    offset: tokens ahead.
    loss: nats per token, held out.
    difference: `loss` less that of the baseline, in nats per token; None of `no_state`.
    difference_stderr: its standard error over documents.
    """

    export: str
    offset: int
    loss: float
    difference: float | None
    difference_stderr: float | None


@dataclass(frozen=True)
class Ranks:
    """Effective ranks by name, one for each run, of `states` states of the first `sequences` sequences; and of the
    logits that the output head makes of them, which some have called by the same name.
    """

    by_name: Mapping[str, Sequence[float]]
    of_logits: Mapping[str, Sequence[float]]
    states: int
    sequences: int


def probes_report(options: Mapping[str, Any], rows: Sequence[ProbeRow], ranks: Ranks, baseline: str) -> Report:
    return Report(
        command=COMMAND,
        options=options,
        summary=_summary(rows, ranks, baseline),
        rows=rows,
        extra={"effective_ranks": ranks.by_name, "effective_ranks_of_logits": ranks.of_logits},
        text=_text(rows, ranks, baseline),
        pictures={PICTURE: lambda: _figure(rows, baseline)},
    )


def _summary(rows: Sequence[ProbeRow], ranks: Ranks, baseline: str) -> dict[str, float]:
    """`{name}_effective_rank` and `…_effective_rank_logits`, `{name}_loss_{offset}`, `{name}_difference_{offset}`,
    `effective_rank_states`.
    """
    summary = {f"{name}_effective_rank": over_runs(own).mean for name, own in ranks.by_name.items()}
    summary |= {f"{name}_effective_rank_logits": over_runs(own).mean for name, own in ranks.of_logits.items()}
    for row in rows:
        summary[f"{row.export}_loss_{row.offset}"] = row.loss
        if row.difference is not None and row.export != baseline:
            summary[f"{row.export}_difference_{row.offset}"] = row.difference
    return {**summary, "effective_rank_states": ranks.states}


def _text(rows: Sequence[ProbeRow], ranks: Ranks, baseline: str) -> str:
    """A line per offset; two columns per name, its loss and how far that is from the baseline's."""
    columns, lines = {"offset": "{offset}"}, {row.offset: {"offset": str(row.offset)} for row in rows}
    for index, name in enumerate(dict.fromkeys(row.export for row in rows)):
        columns[name.replace("_", " ")] = f"{{loss{index}}}"
        compared = name not in (baseline, NO_STATE)
        if compared:
            columns[f"{name} - {baseline}"] = f"{{difference{index}}}"
        for row in (row for row in rows if row.export == name):
            line = lines[row.offset]
            line[f"loss{index}"] = f"{row.loss:.4f}"
            if compared:
                line[f"difference{index}"] = f"{row.difference:+.4f} ± {row.difference_stderr:.4f}"
    found, of_logits = (
        ", ".join(f"{name} {' '.join(f'{rank:.1f}' for rank in own)}" for name, own in by_name.items())
        for by_name in (ranks.by_name, ranks.of_logits)
    )
    return (
        f"{table(columns, list(lines.values()))}\n"
        "nats per token of a linear head on h_t for the token so far ahead; ± one standard error over documents\n"
        f"effective rank of {ranks.states:,} states ({ranks.sequences} sequences; the paper: 256 of 256): {found}\n"
        f"effective rank of their logits: {of_logits}"
    )


def _figure(rows: Sequence[ProbeRow], baseline: str) -> Figure:
    figure, (losses, apart) = panels(2, "Linear probes on frozen hidden states")
    for index, name in enumerate(dict.fromkeys(row.export for row in rows)):
        own = [row for row in rows if row.export == name]
        offsets = [row.offset for row in own]
        blind = name == NO_STATE
        style = {"color": "black", "linestyle": ":"} if blind else {"color": COLORS[index % len(COLORS)], "marker": "o"}
        losses.plot(offsets, [row.loss for row in own], label=name.replace("_", " "), markersize=3.5, **style)
        if not blind:
            errors = [row.difference_stderr for row in own]
            apart.errorbar(offsets, [row.difference for row in own], errors, markersize=3.5, **style)
    losses.set(xlabel="offset (tokens ahead)", ylabel="held-out loss (nats per token)")
    apart.set(xlabel="offset (tokens ahead)", ylabel=f"loss above that of {baseline} (nats per token)")
    for axis in (losses, apart):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.legend(frameon=False)
    return figure
