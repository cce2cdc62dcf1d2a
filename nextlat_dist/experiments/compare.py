"""Cells compared: mean and spread over seeds, as a table, a flat summary and a picture of every seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nextlat_dist.reporting.runs import OverRuns, over_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_PER_LINE = 3
ABLATIONS = "Ablations: each dot a seed, bars their means"
Rows = Sequence[Mapping[str, Any]]  # a finished cell each: variant, seed, seconds, and its numbers by name


def compare(rows: Rows, names: Sequence[str]) -> dict[str, dict[str, OverRuns]]:
    """Variant → name → its values over seeds, in the order of `rows`; what no seed of a variant has is left out."""
    found: dict[str, dict[str, OverRuns]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        values = {name: [row[name] for row in mine if row.get(name) is not None] for name in names}
        found[variant] = {name: over_runs(numbers) for name, numbers in values.items() if numbers}
    return found


def summarise(compared: Mapping[str, Mapping[str, OverRuns]]) -> dict[str, float]:
    """`variant/name/mean`, `…/deviation` (from two seeds on), `…/min`, `…/max` and `…/n`."""
    summary: dict[str, float] = {}
    for variant, numbers in compared.items():
        for name, over in numbers.items():
            parts = {"mean": over.mean, "deviation": over.deviation, "min": over.lowest, "max": over.highest}
            parts["n"] = over.n
            summary |= {f"{variant}/{name}/{part}": value for part, value in parts.items() if value is not None}
    return summary


def table_of(
    compared: Mapping[str, Mapping[str, OverRuns]], headings: Mapping[str, str], rows: Rows
) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Columns and lines of a table: a line per variant, its finished seeds, mean ± deviation per number."""
    columns = [("variant", "{variant}"), ("seeds", "{seeds}")]
    columns += [(heading, f"{{number_{index}}}") for index, heading in enumerate(headings.values())]
    lines = []
    for variant, numbers in compared.items():
        line: dict[str, Any] = {"variant": variant, "seeds": sum(row["variant"] == variant for row in rows)}
        for index, name in enumerate(headings):
            line[f"number_{index}"] = numbers[name].with_deviation() if name in numbers else None
        lines.append(line)
    return columns, lines


def draw(rows: Rows, headings: Mapping[str, str], title: str = ABLATIONS) -> Figure:
    """A panel per number: a line per variant with a dot for every seed and a bar at their mean."""
    from matplotlib.ticker import MaxNLocator

    from nextlat_dist.reporting import pictures

    compared = compare(rows, list(headings))
    variants = list(compared)
    shown = {name: heading for name, heading in headings.items() if any(name in compared[v] for v in variants)}
    columns = min(PANELS_PER_LINE, len(shown))
    figure, axes = pictures.grid(math.ceil(len(shown) / columns), columns, title)
    panels = [axis for line in axes for axis in line]
    for axis in panels[len(shown) :]:
        axis.set_axis_off()
    for (name, heading), axis in zip(shown.items(), panels, strict=False):
        for height, variant in enumerate(variants):
            values = [row[name] for row in rows if row["variant"] == variant and row.get(name) is not None]
            color = pictures.COLORS[height % len(pictures.COLORS)]
            axis.plot(values, [height] * len(values), "o", color=color, alpha=0.6, markersize=5)
            if values:
                axis.plot([compared[variant][name].mean] * 2, [height - 0.3, height + 0.3], color=color, linewidth=2)
        axis.set(title=heading, yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
        axis.tick_params(axis="y", labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    return figure
