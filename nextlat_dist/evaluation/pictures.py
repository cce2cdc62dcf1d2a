"""Pictures of the reports: plain panels, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLORS = ("#2a6fbb", "#d1495b", "#3a9e6e", "#8c5fbf", "#e08e22", "#5b6770")


def panels(count: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure with `count` plain panels side by side; drawn without pyplot, so there is no global state or display."""
    figure = Figure(figsize=(5.2 * count, 3.9), layout="constrained")
    figure.suptitle(title)
    axes = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_picture(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
