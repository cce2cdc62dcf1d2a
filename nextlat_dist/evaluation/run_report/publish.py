"""Writing the report of a run next to its measurements: `report.json`, `report.md` and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextlat_dist.evaluation.run_report.merge import RunReport, merge_run
from nextlat_dist.evaluation.run_report.page import SECONDS
from nextlat_dist.files import RUN_REPORT_FILE, RUN_REPORT_PAGE, write_whole
from nextlat_dist.reporting.pictures import COLORS, panels, save_picture
from nextlat_dist.reporting.report import write_json

LOSS_TERMS_PICTURE = "loss_terms.png"
TIME_SPLIT_PICTURE = "time_split.png"
LOSS_TERMS = {
    **{"loss": "total", "next_token": "next token", "hidden": "hidden state", "kl": "KL"},
    **{"mtp": "multi-token", "jtp": "joint tokens"},
}
VALIDATION = "validation_"  # before the name of a term


def publish_run_report(report: RunReport, run_dir: Path) -> None:
    save_picture(loss_terms_figure(report.entries), run_dir / LOSS_TERMS_PICTURE)
    if "time_split" in report.content["train"]:
        save_picture(time_split_figure(report.entries), run_dir / TIME_SPLIT_PICTURE)
    write_json(run_dir / RUN_REPORT_FILE, report.content)
    write_whole(run_dir / RUN_REPORT_PAGE, report.page)


def write_run_report(run_dir: Path) -> dict[str, Any]:
    """Merge the run's measurements and write them; returns the content of `report.json`.

    Raises:
        UserError: no metrics, or a line of them that is cut short.
    """
    report = merge_run(run_dir)
    publish_run_report(report, run_dir)
    return dict(report.content)


def loss_terms_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per loss term that the run logged, over tokens; validation as dots in the panel of the same term."""
    terms = _terms(entries)
    figure, axes = panels(len(terms), "Loss terms over training tokens")
    for index, (term, axis) in enumerate(zip(terms, axes, strict=True)):
        for name, style in (
            (term, {"linewidth": 1.3, "label": "training"}),
            (f"{VALIDATION}{term}", {"marker": "o", "linestyle": "none", "label": "validation"}),
        ):
            points = [(entry["tokens"] / 1e6, entry[name]) for entry in entries if entry.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), color=COLORS[index % len(COLORS)], **style)
        axis.set(title=LOSS_TERMS.get(term, term.replace("_", " ")), xlabel="tokens (millions)", ylabel="loss")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.legend(frameon=False)
    return figure


def time_split_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds of each part of a step over tokens, one upon the other: what takes less than 1 % is in `other`."""
    lines = [entry for entry in entries if any(name.startswith(SECONDS) for name in entry)]
    lines = lines[1:] or lines  # a first step makes what later ones find
    parts = {
        name.removeprefix(SECONDS): [1000 * line.get(name, 0.0) for line in lines]
        for name in lines[0]
        if name.startswith(SECONDS)
    }
    whole = sum(map(sum, parts.values()))
    shown = {name: values for name, values in parts.items() if name != "other" and sum(values) >= 0.01 * whole}
    hidden = [values for name, values in parts.items() if name not in shown]
    shown["other"] = [sum(values) for values in zip(*hidden, strict=True)] if hidden else [0.0] * len(lines)
    figure, (axis,) = panels(1, "Time of a training step")
    tokens = [line["tokens"] / 1e6 for line in lines]
    below = [0.0] * len(lines)
    for number, (name, values) in enumerate(shown.items()):
        above = [low + value for low, value in zip(below, values, strict=True)]
        color = "0.75" if name == "other" else COLORS[number % len(COLORS)]
        axis.fill_between(tokens, below, above, label=name, color=color, alpha=0.85, linewidth=0)
        below = above
    axis.set(xlabel="tokens (millions)", ylabel="milliseconds", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return figure


def _terms(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those with a title, and of other objectives those that were validated: the metrics hold more than losses."""
    logged = dict.fromkeys(name for entry in entries for name in entry)
    validated = (name.removeprefix(VALIDATION) for name in logged if name.startswith(VALIDATION))
    return [*(term for term in LOSS_TERMS if term in logged), *(term for term in validated if term not in LOSS_TERMS)]
