"""Pictures of the reports: plain panels, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nextlat_dist.files import whole_file

COLORS = ("#2a6fbb", "#d1495b", "#3a9e6e", "#8c5fbf", "#e08e22", "#5b6770")


def panels(count: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure with `count` plain panels side by side; drawn without pyplot, so there is no global state or display."""
    figure, (line,) = grid(1, count, title)
    return figure, line


def grid(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Any]]]:
    """The same with several rows of panels."""
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    figure.suptitle(title)
    axes = [
        [figure.add_subplot(rows, columns, row * columns + column + 1) for column in range(columns)]
        for row in range(rows)
    ]
    for line in axes:
        for axis in line:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_picture(figure: Figure, path: Path) -> None:
    """In the format that the file's ending names, else as a PNG; written whole or not at all."""
    kind = path.suffix.removeprefix(".").lower()
    with whole_file(path) as file:
        figure.savefig(file, dpi=120, format=kind if kind in figure.canvas.get_supported_filetypes() else "png")
