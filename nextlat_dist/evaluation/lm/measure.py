"""Scores of exports on the benchmarks of language models, side by side: one table from lm-evaluation-harness.

    evaluate_lm(exports: Sequence[str], tasks=PAPER_TASKS, *, include_path=None, limit=None, batch_size=8) -> Report

An export is a plain Llama to the harness (`lm.harness`); the latent predictor plays no part.

Command: `nextlat evaluate lm --export [name=]DIR … [--tasks paper] --json FILE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.exports import NamedExport, named_exports
from nextlat_dist.evaluation.lm.harness import load_tasks, run_tasks
from nextlat_dist.reporting.report import Report, versions
from nextlat_dist.reporting.tables import table

COMMAND = "nextlat evaluate lm"
# Of arXiv 2511.05963, by the harness's names.
PAPER_TASKS = (
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "sciq",
    "lambada_openai",
    "wikitext",
)


@dataclass(frozen=True)
class LmRow:
    """One metric of one task for one export.

    Attributes:
        metric: the harness's name, with its filter after a dot where it has one.
        stderr: None where the harness gives none.
        higher_is_better: None where the task does not say.
        documents: scored.
        shots: examples in front of each.
        task_version: the harness's.
    """

    export: str
    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    documents: int | None
    shots: int | None
    task_version: Any


def evaluate_lm(
    exports: Sequence[str],
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Report:
    """Run the harness on every export.

    Args:
        exports: `[name=]DIR` each, written by `nextlat export`.
        tasks: the harness's tasks, groups and tags.
        include_path: a folder of tasks of your own (the harness's YAML files).
        limit: the first documents of each task only; a trial, not a score.
        batch_size: rows scored together.

    Raises:
        UserError: no export, the harness is not installed, a task is unknown, or its data set cannot be fetched.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"--batch-size is {batch_size} and --limit {limit}, but both must be ≥ 1; change the lower one")
    directories = _by_name(named_exports(exports))
    for directory in directories.values():
        if not (directory / "config.json").is_file():
            raise UserError(f"--export {directory} has no config.json; name a directory that `nextlat export` wrote")
    manager, loaded = load_tasks(tasks, include_path)
    rows: list[LmRow] = []
    for name, directory in directories.items():
        rows += _rows(name, run_tasks(directory, manager, loaded, limit, batch_size))
    trial = "" if limit is None else f"\nonly the first {limit} documents of each task: a trial, not a score"
    return Report(
        command=COMMAND,
        options={"tasks": list(tasks), "limit": limit, "batch_size": batch_size},
        summary={f"{row.export}_{row.task}_{row.metric}": row.value for row in rows},
        rows=rows,
        extra={"versions": versions("lm-eval")},
        text=_side_by_side(rows) + trial,
    )


def _by_name(exports: Sequence[NamedExport]) -> dict[str, Path]:
    """The second run of a name is called NAME-2, and so on."""
    return {export.name if export.run == 0 else f"{export.name}-{export.run + 1}": export.path for export in exports}


def _rows(export: str, found: Mapping[str, Any]) -> list[LmRow]:
    """One row per task and metric; a metric's key is `metric,filter`, the filter shown where it is not `none`."""
    rows = []
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, separator, kept = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kept}")
            rows.append(
                LmRow(
                    export=export,
                    task=task,
                    metric=metric if kept == "none" else f"{metric}.{kept}",
                    value=float(value),
                    stderr=error if isinstance(error, float) else None,
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    documents=found["n-samples"].get(task, {}).get("effective"),
                    shots=found["n-shot"].get(task),
                    task_version=found["versions"].get(task),
                )
            )
    return rows


def _side_by_side(rows: Sequence[LmRow]) -> str:
    """A line per task and metric, a column per export."""
    names = list(dict.fromkeys(row.export for row in rows))
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        better = {True: "↑", False: "↓", None: ""}[row.higher_is_better]
        start = {"task": row.task, "metric": row.metric + better, "documents": row.documents}
        line = lines.setdefault((row.task, row.metric), start)
        error = "" if row.stderr is None else f" ± {row.stderr:.4f}"
        line[f"export_{names.index(row.export)}"] = f"{row.value:.4f}{error}"
    columns = {"task": "{task}", "metric": "{metric}", "documents": "{documents}"}
    columns |= {name: f"{{export_{index}}}" for index, name in enumerate(names)}
    return table(columns, list(lines.values()))
