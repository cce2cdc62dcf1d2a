"""Pictures of the speculative report: a row of panels per batch size, a column per temperature.

Speedups by draft length (adaptive as a dashed line across), acceptance by position (smallest batch, longest fixed
length), and where a cycle's time goes (milliseconds for drafting, verifying, the rest).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextlat_dist.evaluation.speculative.records import ALL, MethodInCell
from nextlat_dist.evaluation.speculative.step_costs import MethodSplit
from nextlat_dist.evaluation.speculative.summary import label
from nextlat_dist.reporting.pictures import COLORS, grid

Rows = Sequence[MethodInCell]
PHASES = {"draft_share": "draft", "verify_share": "verify", "overhead_share": "rest"}
OTHERS = COLORS[4:] + COLORS[:4]  # of the other exports; the domains have the first ones


def speedups(rows: Rows, models: Sequence[str]) -> Figure:
    """The main export by domain; of the other ones all domains together."""
    batch_sizes, temperatures = _batch_sizes(rows), _temperatures(rows)
    title = "Decoding speedup over draft length 0 (dashed: adaptive)"
    figure, axes = grid(len(batch_sizes), len(temperatures), title)
    for batch_size, line in zip(batch_sizes, axes, strict=True):
        for temperature, axis in zip(temperatures, line, strict=True):
            panel = _panel(rows, batch_size, temperature)
            for domain, style in _styles(panel).items():
                _draw_speedups(axis, _of(panel, models[0], domain), style, domain == ALL)
            for index, other in enumerate(models[1:]):
                color = OTHERS[index % len(OTHERS)]
                style = {"color": color, "marker": "s", "markersize": 3.5, "label": f"{label(other)}, all"}
                _draw_speedups(axis, _of(panel, other, ALL), style, False)
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set(title=_name(temperature, batch_size), xlabel="draft length (tokens)", ylabel="speedup")
            axis.set_ylim(0, None)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].legend(frameon=False)
    return figure


def _draw_speedups(axis: Any, rows: Rows, style: Mapping[str, Any], band: bool) -> None:
    by_length = {row.method.draft_length: row.speedup for row in rows}
    fixed = {length: by_length[length] for length in sorted(k for k in by_length if isinstance(k, int))}
    if not fixed:
        return
    axis.plot(list(fixed), [speedup.value for speedup in fixed.values()], **style)
    if band:
        low_and_high = ([speedup.low for speedup in fixed.values()], [speedup.high for speedup in fixed.values()])
        axis.fill_between(list(fixed), *low_and_high, color=style["color"], alpha=0.15, linewidth=0)
    if "adaptive" in by_length:
        width = 1.8 if band else 1.0
        axis.axhline(by_length["adaptive"].value, color=style["color"], linewidth=width, linestyle="--")


def acceptance(rows: Rows, model: str) -> Figure:
    """Of the main export, at the smallest batch size and the longest fixed draft length."""
    temperatures, batch_size = _temperatures(rows), min(_batch_sizes(rows))
    longest = max(row.method.draft_length for row in rows if isinstance(row.method.draft_length, int))
    title = f"Accepted drafts by position, draft length {longest}, batch {batch_size}"
    figure, (line,) = grid(1, len(temperatures), title)
    for temperature, axis in zip(temperatures, line, strict=True):
        panel = [row for row in _panel(rows, batch_size, temperature) if row.method.model == model]
        for domain, style in _styles(panel).items():
            for row in _of(panel, model, domain):
                if row.method.draft_length == longest:
                    shares = row.acceptance_by_position
                    axis.plot(range(1, len(shares) + 1), shares, **style)
        axis.set(
            title=_name(temperature), xlabel="draft position", ylabel="share of cycles that accept it", ylim=(0, 1)
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    line[0].legend(frameon=False)
    return figure


def split(splits: Sequence[MethodSplit], model: str) -> Figure:
    """Of the main export, by draft length."""
    batch_sizes = sorted({entry.batch_size for entry in splits})
    temperatures = sorted({entry.temperature for entry in splits})
    figure, axes = grid(len(batch_sizes), len(temperatures), "Where a cycle's time goes")
    for batch_size, line in zip(batch_sizes, axes, strict=True):
        for temperature, axis in zip(temperatures, line, strict=True):
            where = (model, batch_size, temperature)
            panel = [entry for entry in splits if (entry.method.model, entry.batch_size, entry.temperature) == where]
            names = [str(entry.method.draft_length) for entry in panel]
            bottom = [0.0] * len(panel)
            for index, (share, phase) in enumerate(PHASES.items()):
                height = [entry.cycles.milliseconds * entry.cycles.shares[share] for entry in panel]
                axis.bar(names, height, bottom=bottom, color=COLORS[index], label=phase)
                bottom = [below + own for below, own in zip(bottom, height, strict=True)]
            axis.set(title=_name(temperature, batch_size), xlabel="draft length", ylabel="milliseconds per cycle")
            axis.tick_params(axis="x", labelsize=7)
    axes[0][0].legend(frameon=False)
    return figure


def _styles(rows: Rows) -> dict[str, dict[str, Any]]:
    """Domain → how its line looks; ALL is black and thick."""
    styles = {}
    for index, domain in enumerate(dict.fromkeys(row.cell.domain for row in rows)):
        color = "black" if domain == ALL else COLORS[index % len(COLORS)]
        look = {"color": color, "marker": "o", "markersize": 3.5, "label": domain}
        styles[domain] = look | {"linewidth": 2.2 if domain == ALL else 1.3}
    return styles


def _batch_sizes(rows: Rows) -> list[int]:
    return sorted({row.cell.batch_size for row in rows})


def _temperatures(rows: Rows) -> list[float]:
    return sorted({row.cell.temperature for row in rows})


def _panel(rows: Iterable[MethodInCell], batch_size: int, temperature: float) -> list[MethodInCell]:
    return [row for row in rows if (row.cell.batch_size, row.cell.temperature) == (batch_size, temperature)]


def _of(rows: Iterable[MethodInCell], model: str, domain: str) -> list[MethodInCell]:
    return [row for row in rows if (row.method.model, row.cell.domain) == (model, domain)]


def _name(temperature: float, batch_size: int | None = None) -> str:
    name = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return name if batch_size is None else f"{name}, batch {batch_size}"
