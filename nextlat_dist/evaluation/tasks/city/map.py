"""The map that a model believes in: streets that its trips drive, impossible ones in red.

Every side of a street is an arrow on the right of its middle line, as traffic keeps right: black where trips went,
grey where the city has a street that no trip took, red where a trip went and the city has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nextlat_dist.reporting.pictures import panels
from nextlat_dist.tasks.city import MOVES, NO_STREET, City

SIDE = 0.08  # how far a side keeps from the middle line, in blocks
REAL, UNUSED, IMPOSSIBLE = "#222222", "#c8ccd0", "#d62728"


def map_figure(city: City, driven: Mapping[str, np.ndarray]) -> Figure:
    """A map for each named model, next to each other, from its `CityScores.driven` int64 [places, 4]."""
    figure, axes = panels(len(driven), f"The map a model believes in, city of {city.rows} x {city.columns}")
    for (name, counts), axis in zip(driven.items(), axes, strict=True):
        impossible = int((counts[city.streets == NO_STREET] > 0).sum())
        _draw_map(axis, city, counts)
        axis.set_title(f"{name}: {impossible} impossible street{'' if impossible == 1 else 's'}")
    return figure


def _draw_map(axis: Any, city: City, counts: np.ndarray) -> None:
    axis.set(xlim=(-0.9, city.columns - 0.1), ylim=(city.rows - 0.1, -0.9), aspect="equal", xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)
    row, column = np.divmod(np.arange(city.places), city.columns)
    axis.plot(column, row, "o", color=UNUSED, markersize=3, zorder=1)
    real = city.streets != NO_STREET
    styles = ((real & (counts == 0), UNUSED, 2), (real & (counts > 0), REAL, 3), (~real & (counts > 0), IMPOSSIBLE, 4))
    for chosen, color, height in styles:
        for turn, (down, right) in enumerate(MOVES):
            here = np.flatnonzero(chosen[:, turn])
            axis.quiver(
                column[here] + 0.14 * right - SIDE * down,
                row[here] + 0.14 * down + SIDE * right,
                np.full(len(here), 0.72 * right),
                np.full(len(here), 0.72 * down),
                color=color,
                zorder=height,
                angles="xy",
                scale_units="xy",
                scale=1,
                width=0.006,
            )
