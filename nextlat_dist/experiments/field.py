"""The whole field on one page: every objective, at equal steps, on text and on the paper's tasks.

Each part is a grid of configs/experiments, `NAME_field.yaml`, run below OUTPUT/NAME by `ablate`, whose invariant holds:
what is finished is kept, so the same command resumes. Numbers keep the names of their grid behind the part's,
`text/training/validation_next_token`; the picture has a panel for each, with a dot for every seed.

    nextlat experiments field --scale cpu --output runs/field --jobs 2 --json field.json --pictures DIR

`solved_share_…` (`…_low`, `…_high`)    share of Path-Star's runs that solve it, with Wilson's interval
`loss_…`, `accepted_…`, `accepted_sampled_…`, `effective_rank_…`    on text, means over seeds
`step_seconds_…`, `parameters_…`        of its runs
`countdown_…`                           share of problems solved, greedily
`tracking_…`, `tracking_longer_…`       right products of A5 at the length of training and at twice that
`tracking_rnn_longer_…`                 of the latent predictor alone, at twice that
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nextlat_dist.config.shipped import shipped_root
from nextlat_dist.errors import UserError
from nextlat_dist.experiments.ablate import ablate
from nextlat_dist.experiments.compare import compare, draw, table_of
from nextlat_dist.experiments.grid import cells_of, read_grid
from nextlat_dist.plan.counting import parameter_counts
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.runs import OverRuns
from nextlat_dist.reporting.tables import table

COMMAND = "nextlat experiments field"
PICTURE, TITLE = "field.png", "Objectives at equal steps: each dot a seed, bars their means"
TEXT, PATH_STAR, COUNTDOWN, TRACKING = "text", "path_star", "countdown", "tracking"
SCALES: Mapping[str, Sequence[str]] = {"cpu": (TEXT, PATH_STAR, COUNTDOWN, TRACKING)}
SUMMARY = {
    "loss": f"{TEXT}/training/validation_next_token",
    "accepted": f"{TEXT}/drafts/accepted_tokens_per_cycle",
    "accepted_sampled": f"{TEXT}/drafts/sampled_accepted_tokens_per_cycle",
    "effective_rank": f"{TEXT}/states/run_effective_rank",
    "step_seconds": f"{TEXT}/training/step_seconds",
    "countdown": f"{COUNTDOWN}/answers/run_solved_greedy",
    "tracking": f"{TRACKING}/products/run_transformer_1x",
    "tracking_longer": f"{TRACKING}/products/run_transformer_2x",
    "tracking_rnn_longer": f"{TRACKING}/products/run_latent_rnn_2x",
}


def field(
    scale: str,
    output: Path,
    *,
    parts: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
) -> Report:
    """Run what is left of the parts, and put them next to each other.

    Args:
        parts: some of `SCALES[scale]`; none: all.
        seeds, jobs, overrides: see `ablate`; seeds default to each grid's own.

    Raises:
        UserError: a part that there is not, and as `ablate`.
    """
    known = SCALES[scale]
    for part in parts:
        if part not in known:
            raise UserError(f"--parts has {part!r}; they are {', '.join(known)}")
    reports = {}
    for part in [part for part in known if part in (parts or known)]:
        say(f"{part}: begins", error=True)
        reports[part] = ablate(grid_file(part), output / part, seeds=seeds, jobs=jobs, overrides=overrides)
    return report_of(reports, _parameters(output, reports), _solved(output, reports))


def grid_file(part: str) -> Path:
    return shipped_root() / "configs" / "experiments" / f"{part}_field.yaml"


def _parameters(output: Path, parts: Iterable[str]) -> dict[str, int]:
    """Of each variant's model on text, trained ones."""
    if TEXT not in parts:
        return {}
    cells = cells_of(read_grid(grid_file(TEXT)), [0], output / TEXT)
    return {cell.variant: sum(parameter_counts(cell.config).values()) for cell in cells}


def _solved(output: Path, parts: Iterable[str]) -> dict[str, float]:
    """`NAME_solved_share`, `NAME_solved_low`, `NAME_solved_high` of Path-Star's report; none where a run failed."""
    path = output / PATH_STAR / "report.json"
    if PATH_STAR not in parts or not path.is_file():
        return {}
    summary = json.loads(path.read_text())["summary"]
    return {name: value for name, value in summary.items() if "_solved_" in name}


def report_of(reports: Mapping[str, Report], parameters: Mapping[str, int], solved: Mapping[str, float]) -> Report:
    """One page of the parts' reports."""
    headings, rows, remarks = dict[str, str](), list[dict[str, Any]](), list[str]()
    for part, report in reports.items():
        headings |= {f"{part}/{name}": f"{part}: {heading}" for name, heading in report.extra["headings"].items()}
        for row in report.rows:
            numbers = {f"{part}/{name}": row[name] for name in report.extra["headings"] if name in row}
            rows.append(
                {"part": part, "variant": row["variant"], "seed": row["seed"], "seconds": row["seconds"], **numbers}
            )
        remarks += [f"{part}: {remark}" for remark in report.remarks]
    compared = compare(rows, list(headings))
    return Report(
        command=COMMAND,
        options={part: dict(report.options) for part, report in reports.items()},
        summary=_summary(compared, parameters, solved),
        rows=rows,
        extra={
            "headings": headings,
            "failures": [failure for report in reports.values() for failure in report.extra["failures"]],
            "missing": {name: names for report in reports.values() for name, names in report.extra["missing"].items()},
        },
        text=_text(compared, headings, rows, reports, parameters, solved),
        remarks=remarks,
        pictures={PICTURE: partial(draw, rows, headings, TITLE)},
    )


def _summary(
    compared: Mapping[str, Mapping[str, OverRuns]], parameters: Mapping[str, int], solved: Mapping[str, float]
) -> dict[str, float]:
    summary: dict[str, float] = {}
    for variant in compared:
        for end in ("share", "low", "high"):
            if f"{variant}_solved_{end}" in solved:
                name = f"solved_share_{variant}" if end == "share" else f"solved_share_{variant}_{end}"
                summary[name] = solved[f"{variant}_solved_{end}"]
        for name, number in SUMMARY.items():
            if number in compared[variant]:
                summary[f"{name}_{variant}"] = compared[variant][number].mean
        if variant in parameters:
            summary[f"parameters_{variant}"] = parameters[variant]
    return summary


def _text(
    compared: Mapping[str, Mapping[str, OverRuns]],
    headings: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    reports: Mapping[str, Report],
    parameters: Mapping[str, int],
    solved: Mapping[str, float],
) -> str:
    """A table per part: a line for each objective."""
    texts = []
    for part in reports:
        own = {
            name: heading.removeprefix(f"{part}: ") for name, heading in headings.items() if name.startswith(f"{part}/")
        }
        columns, lines = table_of(compared, own, [row for row in rows if row["part"] == part])
        if part == TEXT:
            columns.append(("parameters", "{parameters:,}"))
        if part == PATH_STAR:
            columns.append(("solved", "{solved}"))
        for line in lines:
            line["parameters"] = parameters.get(line["variant"])
            share, low, high = (solved.get(f"{line['variant']}_solved_{end}") for end in ("share", "low", "high"))
            line["solved"] = None if share is None else f"{share:.2f} ({low:.2f}–{high:.2f})"
        texts.append(f"{part}\n{table(columns, [line for line in lines if line['seeds']])}")
    texts.append("mean ± sample standard deviation over seeds; solved: share of runs, with its 95% interval")
    return "\n\n".join(texts)
