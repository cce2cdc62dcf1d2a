"""Pictures of the task report: accuracy by position, a colour per name of an export.

A line is the mean over the runs of a name; its band is their lowest and highest, or the 95% interval of a single run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextlat_dist.evaluation.tasks.scores import Curve, Runs
from nextlat_dist.reporting.pictures import COLORS, panels
from nextlat_dist.reporting.runs import over_runs
from nextlat_dist.tasks import Task

POSITION_PICTURE = "accuracy_by_position.png"


def answer_pictures(
    task: Task, runs: Runs, guess: float | None = None, guessing: str = "guessing"
) -> Mapping[str, Callable[[], Figure]]:
    """`accuracy_by_position.png`; `guess`: a line for what `guessing` reaches."""
    return {POSITION_PICTURE: lambda: _answers_figure(task, runs, guess, guessing)}


def _answers_figure(task: Task, runs: Runs, guess: float | None, guessing: str) -> Figure:
    curves = list(next(iter(runs.values()))[0].curves)
    figure, axes = panels(len(curves), f"Right answer tokens, {task.name}")
    for curve, axis in zip(curves, axes, strict=True):
        for (name, scores), color in zip(runs.items(), colors(runs), strict=True):
            style = {"color": color, "label": name, "marker": "o", "markersize": 3.5}
            draw_curve(axis, [own.curves[curve] for own in scores], style)
        if guess is not None:
            axis.axhline(guess, color="grey", linewidth=0.8, label=guessing)
        axis.set(title=_title(curve), xlabel="answer token", ylabel="share right", ylim=(0, 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    return figure


def draw_curve(axis: Any, runs: Sequence[Curve], style: Mapping[str, Any]) -> None:
    """The curve of one name, as far as its shortest run goes."""
    last = min(curve.last for curve in runs)
    positions = list(range(runs[0].first, last + 1))
    points = []
    for position in positions:
        shares = [curve.at(position) for curve in runs]
        points.append(over_runs([share.value for share in shares], shares[0].interval))
    axis.plot(positions, [point.mean for point in points], **style)
    low, high = zip(*(point.bounds or (point.mean, point.mean) for point in points), strict=True)
    axis.fill_between(positions, low, high, color=style["color"], alpha=0.15, linewidth=0)


def colors(runs: Runs) -> list[str]:
    """One per name."""
    return [COLORS[index % len(COLORS)] for index in range(len(runs))]


def _title(curve: str) -> str:
    if curve == "greedy":
        return "free-running, greedy"
    temperature = re.fullmatch(r"t([\d.e-]+)", curve)
    return f"free-running, temperature {temperature[1]}" if temperature else curve.replace("_", " ")
