"""Cells to a comparison: mean and spread over seeds, as a table, a flat summary and a picture of every seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextlat_dist.reporting import pictures

PANELS_PER_LINE = 3
Rows = Sequence[Mapping[str, Any]]  # a finished cell each: variant, seed, seconds, and its numbers by place


@dataclass(frozen=True)
class Spread:
    """Over seeds; `deviation` is the sample standard deviation (n - 1), None for a single seed."""

    mean: float
    deviation: float | None
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.deviation is None else f"{self.mean:.3f} ± {self.deviation:.3f}"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, min(values), max(values), len(values))


def compare(rows: Rows, places: Sequence[str]) -> dict[str, dict[str, Spread]]:
    """Variant → place → spread, in the order of `rows`; a number that no seed of a variant has is left out."""
    found: dict[str, dict[str, Spread]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        values = {place: [row[place] for row in mine if row.get(place) is not None] for place in places}
        found[variant] = {place: spread(numbers) for place, numbers in values.items() if numbers}
    return found


def summarise(compared: Mapping[str, Mapping[str, Spread]]) -> dict[str, float]:
    """`variant/place/mean`, `…/deviation` (from two seeds on), `…/min`, `…/max` and `…/n`."""
    summary: dict[str, float] = {}
    for variant, spreads in compared.items():
        for place, over_seeds in spreads.items():
            named = {"mean": over_seeds.mean, "deviation": over_seeds.deviation, "min": over_seeds.low}
            named |= {"max": over_seeds.high, "n": over_seeds.n}
            summary |= {f"{variant}/{place}/{name}": value for name, value in named.items() if value is not None}
    return summary


def table_of(
    compared: Mapping[str, Mapping[str, Spread]], headings: Mapping[str, str], rows: Rows
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Columns and lines for `report.table`: a line per variant, its finished seeds, mean ± deviation per number."""
    columns = {"variant": "{variant}", "seeds": "{seeds}"}
    columns |= {heading: f"{{number_{index}}}" for index, heading in enumerate(headings.values())}
    lines = []
    for variant, spreads in compared.items():
        line: dict[str, Any] = {"variant": variant, "seeds": sum(row["variant"] == variant for row in rows)}
        for index, place in enumerate(headings):
            line[f"number_{index}"] = str(spreads[place]) if place in spreads else None
        lines.append(line)
    return columns, lines


def draw(rows: Rows, headings: Mapping[str, str], path: Path) -> None:
    """A panel per number: a line per variant with a dot for every seed and a bar at their mean."""
    compared = compare(rows, list(headings))
    variants = list(compared)
    shown = {place: heading for place, heading in headings.items() if any(place in compared[v] for v in variants)}
    columns = min(PANELS_PER_LINE, len(shown))
    figure, axes = pictures.grid(
        math.ceil(len(shown) / columns), columns, "Ablations: each dot a seed, bars their means"
    )
    panels = [axis for line in axes for axis in line]
    for axis in panels[len(shown) :]:
        axis.set_axis_off()
    for (place, heading), axis in zip(shown.items(), panels, strict=False):
        for height, variant in enumerate(variants):
            values = [row[place] for row in rows if row["variant"] == variant and row.get(place) is not None]
            color = pictures.COLORS[height % len(pictures.COLORS)]
            axis.plot(values, [height] * len(values), "o", color=color, alpha=0.6, markersize=5)
            if values:
                axis.plot([compared[variant][place].mean] * 2, [height - 0.3, height + 0.3], color=color, linewidth=2)
        axis.set(title=heading, yticks=range(len(variants)), yticklabels=variants, ylim=(len(variants) - 0.5, -0.5))
        axis.tick_params(axis="y", labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(5))
    pictures.save_picture(figure, path)
