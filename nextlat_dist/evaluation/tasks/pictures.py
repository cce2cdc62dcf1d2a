"""Pictures of the task report: accuracy by position, a colour per name of an export.

A line is the mean over the runs of a name; its band is their lowest and highest, or the 95% interval of a single run.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextlat_dist.evaluation.tasks.city.map import draw_maps
from nextlat_dist.evaluation.tasks.city.scores import CityScores
from nextlat_dist.evaluation.tasks.scores import Curve, Runs
from nextlat_dist.reporting import pictures
from nextlat_dist.tasks import Task
from nextlat_dist.tasks.city import City
from nextlat_dist.tasks.path_star import PathStar
from nextlat_dist.tasks.state_tracking import StateTracking

TRACKING_STYLES = {"transformer": "--", "latent_rnn": "-"}


def draw_pictures(task: Task, runs: Runs, directory: Path) -> None:
    """`accuracy_by_length.png` of state tracking, `accuracy_by_position.png` of the others; of a city also `map.png`,
    the maps that the first runs believe in.
    """
    if isinstance(task, StateTracking):
        _draw_tracking(task, runs, directory / "accuracy_by_length.png")
        return
    _draw_answers(task, runs, directory / "accuracy_by_position.png")
    driven = {name: scores[0].driven for name, scores in runs.items() if isinstance(scores[0], CityScores)}
    if isinstance(task, City):
        draw_maps(task, driven, directory / "map.png")


def _draw_tracking(task: StateTracking, runs: Runs, path: Path) -> None:
    figure, (axis,) = pictures.panels(1, f"State tracking, {task.group or 'a group'} of {task.world.order} elements")
    for (name, scores), color in zip(runs.items(), _colors(runs), strict=True):
        for curve in scores[0].curves:
            style = {"color": color, "linestyle": TRACKING_STYLES[curve], "label": f"{name}, {curve.replace('_', ' ')}"}
            _draw_curve(axis, [own.curves[curve] for own in scores], style)
    axis.axvline(task.length, color="black", linewidth=0.8, linestyle=":", label="training length")
    axis.axhline(1 / task.world.order, color="grey", linewidth=0.8, label="guessing")
    axis.set(xlabel="elements read", ylabel="right products", ylim=(0, 1.02))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=7)
    pictures.save_picture(figure, path)


def _draw_answers(task: Task, runs: Runs, path: Path) -> None:
    curves = list(next(iter(runs.values()))[0].curves)
    figure, axes = pictures.panels(len(curves), f"Right answer tokens, {task.name}")
    for curve, axis in zip(curves, axes, strict=True):
        for (name, scores), color in zip(runs.items(), _colors(runs), strict=True):
            style = {"color": color, "label": name, "marker": "o", "markersize": 3.5}
            _draw_curve(axis, [own.curves[curve] for own in scores], style)
        if isinstance(task, PathStar):
            axis.axhline(1 / task.arms, color="grey", linewidth=0.8, label="guessing an arm")
        axis.set(title=_title(curve), xlabel="answer token", ylabel="share right", ylim=(0, 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False)
    pictures.save_picture(figure, path)


def _draw_curve(axis: Any, runs: Sequence[Curve], style: Mapping[str, Any]) -> None:
    last = min(curve.last for curve in runs)
    positions = list(range(runs[0].first, last + 1))
    points = [[curve.at(position) for curve in runs] for position in positions]
    axis.plot(positions, [statistics.mean(share.value for share in shares) for shares in points], **style)
    bounds = [
        shares[0].interval if len(shares) == 1 else (min(s.value for s in shares), max(s.value for s in shares))
        for shares in points
    ]
    low, high = zip(*bounds, strict=True)
    axis.fill_between(positions, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _colors(runs: Runs) -> list[str]:
    return [pictures.COLORS[place % len(pictures.COLORS)] for place in range(len(runs))]


def _title(curve: str) -> str:
    if curve == "greedy":
        return "free-running, greedy"
    temperature = re.fullmatch(r"t([\d.e-]+)", curve)
    return f"free-running, temperature {temperature[1]}" if temperature else curve.replace("_", " ")
