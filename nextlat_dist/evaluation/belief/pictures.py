"""Pictures of the belief report: rollouts by step, and the geometry of beliefs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from nextlat_dist.evaluation.belief.rows import EXACT, FITTED, OWN, BeliefRow, grouped
from nextlat_dist.evaluation.belief.verdicts import CONSISTENT, SUFFICIENT, Property
from nextlat_dist.reporting.pictures import COLORS, panels

POINTS = 4000  # beliefs drawn for each model: more hide each other
SMALLEST_SHOWN = 1e-4  # what is less is drawn there: the axis is logarithmic
LINES = {OWN: "-", FITTED: "--", EXACT: ":"}


@dataclass(frozen=True)
class _Panel:
    """A curve over rollout steps: a field of the rows, and the property whose threshold is drawn into it."""

    field: str
    title: str
    property: Property


PANELS = (
    _Panel("kl_ratio", "KL of the future, share of knowing nothing", SUFFICIENT),
    _Panel("transition_error", "transition error, tokens that came", CONSISTENT),
    _Panel("counterfactual_error", "transition error, another token first", CONSISTENT),
)


def steps_figure(rows: Sequence[BeliefRow]) -> Figure:
    """A panel per curve over rollout steps: mean of the runs, from the lowest to the highest shaded."""
    figure, axes = panels(len(PANELS), "Rolled out from one state")
    for panel, axis in zip(PANELS, axes, strict=True):
        for index, ((model, predictor), own) in enumerate(grouped(rows).items()):
            curves = np.array([curve for row in own if (curve := getattr(row, panel.field)) is not None])
            if not len(curves):
                continue
            steps = np.arange(1, curves.shape[1] + 1)
            colour = COLORS[index % len(COLORS)]
            curves = np.maximum(curves, SMALLEST_SHOWN)
            label = model if predictor == EXACT else f"{model}, p_ψ {predictor}"
            axis.plot(steps, curves.mean(axis=0), LINES[predictor], color=colour, label=label)
            axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15)
        if panel.property is SUFFICIENT:
            forgetful = np.maximum(rows[0].forgetful_ratio, SMALLEST_SHOWN)
            axis.plot(np.arange(1, len(forgetful) + 1), forgetful, color="#999999", label="forgetful")
        axis.axhline(panel.property.threshold, color="black", lw=0.8, ls="-.")
        axis.set_yscale("log")
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlabel("steps from the state")
    axes[0].legend(fontsize=7)
    return figure


def geometry_figure(geometry: Mapping[str, np.ndarray]) -> Figure:
    """Beliefs on the two main axes of the exact ones, coloured by the exact belief."""
    exact = next(iter(geometry.values()))
    mean = exact.mean(axis=0)
    axes_of = np.linalg.svd(exact - mean, full_matrices=False)[2][:2]
    colours = np.zeros((len(exact), 3))
    colours[:, : min(3, exact.shape[1])] = exact[:, :3] / np.maximum(exact[:, :3].max(axis=0), 1e-9)
    figure, axes = panels(len(geometry), "Beliefs, exact and read off the states by a linear map")
    shown = slice(None, POINTS)
    for (name, beliefs), axis in zip(geometry.items(), axes, strict=True):
        x, y = ((beliefs[shown] - mean) @ direction for direction in (axes_of[0], axes_of[-1]))
        axis.scatter(x, y, s=3, c=np.clip(colours[shown], 0, 1), linewidths=0)
        axis.set_title(name, fontsize=10)
    return figure
