"""Pictures of the speculative report: a row of panels per batch size, a column per temperature.

`speedup_by_draft_length.png` (adaptive as a dashed line across), `acceptance_by_position.png` (smallest batch, longest
fixed length) and `cost_split.png` (milliseconds per cycle: drafting, verifying, the rest).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextlat_dist.evaluation.speculative.trials import ALL, NEXTLAT, RIVAL
from nextlat_dist.reporting import pictures

Rows = Sequence[Mapping[str, Any]]
PHASES = {"draft_share": "draft", "verify_share": "verify", "overhead_share": "rest"}


def draw_pictures(content: Mapping[str, Any], directory: Path) -> None:
    """From the content of the JSON."""
    _draw_speedups(content["rows"], directory / "speedup_by_draft_length.png")
    _draw_acceptance(content["rows"], directory / "acceptance_by_position.png")
    _draw_split(content["cycle_split"], directory / "cost_split.png")


def _draw_speedups(rows: Rows, path: Path) -> None:
    batch_sizes, temperatures = _values(rows, "batch_size"), _values(rows, "temperature")
    title = "Decoding speedup over draft length 0 (dashed: adaptive)"
    figure, axes = pictures.grid(len(batch_sizes), len(temperatures), title)
    for batch_size, line in zip(batch_sizes, axes, strict=True):
        for temperature, axis in zip(temperatures, line, strict=True):
            panel = _where(rows, batch_size=batch_size, temperature=temperature)
            for domain, style in _styles(panel).items():
                _draw_model(axis, _where(panel, model=NEXTLAT, domain=domain), style, domain == ALL)
            rival = {"color": pictures.COLORS[4], "marker": "s", "markersize": 3.5, "label": "MTP, all"}
            _draw_model(axis, _where(panel, model=RIVAL, domain=ALL), rival, False)
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set(title=_name(temperature, batch_size), xlabel="draft length (tokens)", ylabel="speedup")
            axis.set_ylim(0, None)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0][0].legend(frameon=False)
    pictures.save_picture(figure, path)


def _draw_model(axis: Any, rows: Rows, style: Mapping[str, Any], band: bool) -> None:
    fixed = sorted((row for row in rows if row["draft_length"] != "adaptive"), key=lambda row: row["draft_length"])
    if not fixed:
        return
    lengths = [row["draft_length"] for row in fixed]
    axis.plot(lengths, [row["speedup"] for row in fixed], **style)
    if band:
        low_and_high = ([row["speedup_low"] for row in fixed], [row["speedup_high"] for row in fixed])
        axis.fill_between(lengths, *low_and_high, color=style["color"], alpha=0.15, linewidth=0)
    for row in _where(rows, draft_length="adaptive"):
        axis.axhline(row["speedup"], color=style["color"], linewidth=1.8 if band else 1.0, linestyle="--")


def _draw_acceptance(rows: Rows, path: Path) -> None:
    temperatures, batch_size = _values(rows, "temperature"), min(_values(rows, "batch_size"))
    longest = max(row["draft_length"] for row in rows if isinstance(row["draft_length"], int))
    title = f"Accepted drafts by position, draft length {longest}, batch {batch_size}"
    figure, (line,) = pictures.grid(1, len(temperatures), title)
    for temperature, axis in zip(temperatures, line, strict=True):
        panel = _where(rows, batch_size=batch_size, temperature=temperature, model=NEXTLAT)
        for domain, style in _styles(panel).items():
            for row in _where(panel, domain=domain, draft_length=longest):
                shares = row["acceptance_by_position"]
                axis.plot(range(1, len(shares) + 1), shares, **style)
        axis.set(
            title=_name(temperature), xlabel="draft position", ylabel="share of cycles that accept it", ylim=(0, 1)
        )
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    line[0].legend(frameon=False)
    pictures.save_picture(figure, path)


def _draw_split(splits: Rows, path: Path) -> None:
    batch_sizes, temperatures = _values(splits, "batch_size"), _values(splits, "temperature")
    figure, axes = pictures.grid(len(batch_sizes), len(temperatures), "Where a cycle's time goes")
    for batch_size, line in zip(batch_sizes, axes, strict=True):
        for temperature, axis in zip(temperatures, line, strict=True):
            panel = _where(splits, batch_size=batch_size, temperature=temperature, model=NEXTLAT)
            names = [str(split["draft_length"]) for split in panel]
            bottom = [0.0] * len(panel)
            for index, (share, phase) in enumerate(PHASES.items()):
                height = [split["milliseconds_per_cycle"] * split[share] for split in panel]
                axis.bar(names, height, bottom=bottom, color=pictures.COLORS[index], label=phase)
                bottom = [below + own for below, own in zip(bottom, height, strict=True)]
            axis.set(title=_name(temperature, batch_size), xlabel="draft length", ylabel="milliseconds per cycle")
            axis.tick_params(axis="x", labelsize=7)
    axes[0][0].legend(frameon=False)
    pictures.save_picture(figure, path)


def _styles(rows: Rows) -> dict[str, dict[str, Any]]:
    """Domain → how its line looks; ALL is black and thick."""
    styles = {}
    for index, domain in enumerate(dict.fromkeys(row["domain"] for row in rows)):
        color = "black" if domain == ALL else pictures.COLORS[index % len(pictures.COLORS)]
        look = {"color": color, "marker": "o", "markersize": 3.5, "label": domain}
        styles[domain] = look | {"linewidth": 2.2 if domain == ALL else 1.3}
    return styles


def _values(rows: Rows, field: str) -> list[Any]:
    return sorted({row[field] for row in rows})


def _where(rows: Rows, **fields: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if fields.items() <= row.items()]


def _name(temperature: float, batch_size: int | None = None) -> str:
    name = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return name if batch_size is None else f"{name}, batch {batch_size}"
