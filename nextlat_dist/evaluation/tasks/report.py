"""How well exports do a task, side by side: the table, the JSON, the pictures.

    evaluate_task(exports: ["gpt=DIR", "nextlat=DIR", …], data: Path, *, documents=1000, temperatures=(0.0, 1.0),
                  seed=0, json_path=None, picture_dir=None, progress=True) -> dict

All exports answer the same documents, the first ones of the dataset. Exports of one name are runs (seeds) of it: what
is reported of a name is the mean over its runs, with the lowest and the highest.

Command: `nextlat evaluate task --export gpt=DIR nextlat=DIR --data DIR/test --json FILE --pictures DIR`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.exports import NamedExport, named_exports
from nextlat_dist.evaluation.tasks import data as task_data
from nextlat_dist.evaluation.tasks.pictures import draw_pictures
from nextlat_dist.evaluation.tasks.scores import Runs, Scores, Share
from nextlat_dist.evaluation.tasks.scoring import Sampled, score_export
from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.reporting import report
from nextlat_dist.reporting.report import Progress
from nextlat_dist.tasks import Task, task_of


@dataclass(frozen=True)
class Summary:
    """One number of one name: a single run has Wilson's interval over documents (None of a plain number), several have
    the lowest and the highest run.
    """

    mean: float
    low: float | None
    high: float | None
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.low is None else f"{self.mean:.3f} ({self.low:.3f}–{self.high:.3f})"


def evaluate_task(
    exports: Sequence[str],
    data: Path,
    *,
    documents: int = 1000,
    temperatures: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score, print the table, write JSON and pictures where asked, and return the content of the JSON.

    Args:
        exports: `[name=]DIR` each, written by `nextlat export`; see `evaluation.exports`.
        data: a split that `nextlat-data task` wrote.
        documents: as many are scored, or all if there are fewer.
        temperatures: of free-running answers; 0 is greedy.
        seed: of sampled answers.

    Raises:
        UserError: bad options or data, an export that does not know the tokens of the task, or a task without answers.
    """
    named = named_exports(exports)
    manifest = read_manifest(open_storage(data))
    task = task_of(manifest)
    for export in named:
        _check_vocabulary(export, manifest, data)
    asked = list(task_data.documents(data, documents))
    sampled = Sampled(tuple(sorted(set(temperatures))), seed)
    runs: dict[str, list[Scores]] = {}
    for export in named:
        label = f"{export.name} {export.run}"

        def watch(what: str, total: int, label: str = label) -> Progress:
            return Progress(f"{label}, {what}", total, progress)

        scores = score_export(export.path, task, asked, sampled, watch)
        first = runs.setdefault(export.name, [scores])[0]
        if scores.numbers.keys() != first.numbers.keys():
            raise UserError(
                f"{export.path} is called {export.name!r} as another export is, but only one of them has a latent "
                "predictor; give them different names with --export name=DIR"
            )
        if scores is not first:
            runs[export.name].append(scores)
    content = report.envelope(
        "nextlat evaluate task",
        {"task": task.name, "parameters": task.parameters, "temperatures": sampled.temperatures, "seed": seed},
        summarise(runs) | {"documents": len(asked)},
        rows_of(runs),
    )
    print(table(task, runs, len(asked)))
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        draw_pictures(task, runs, picture_dir)
    return content


def _check_vocabulary(export: NamedExport, manifest: Manifest, data: Path) -> None:
    if not (export.path / "config.json").is_file():
        raise UserError(f"{export.path} is no export: it has no config.json; write it with `nextlat export`")
    known = LlamaConfig.from_directory(export.path).vocab_size
    if known < manifest.tokenizer.vocab_size:
        raise UserError(
            f"{export.path} knows {known} token ids, but {data} has {manifest.tokenizer.vocab_size}; give an export "
            "trained on this task"
        )


def pooled(scores: Sequence[Scores], name: str) -> Summary:
    """A number over the runs of one name."""
    numbers = [own.numbers[name] for own in scores]
    values = [number.value if isinstance(number, Share) else number for number in numbers]
    if len(values) > 1:
        return Summary(statistics.mean(values), min(values), max(values), len(values))
    if isinstance(numbers[0], Share):
        return Summary(values[0], *numbers[0].interval, 1)
    return Summary(values[0], None, None, 1)


def summarise(runs: Runs) -> dict[str, float]:
    """Flat: `nextlat_exact_greedy`; with several runs also `…_lowest` and `…_highest`; and `guess_exact_greedy`."""
    summary: dict[str, float] = {}
    for name, scores in runs.items():
        for number in scores[0].numbers:
            over = pooled(scores, number)
            summary[f"{name}_{number}"] = over.mean
            if over.runs > 1 and over.low is not None and over.high is not None:
                summary |= {f"{name}_{number}_lowest": over.low, f"{name}_{number}_highest": over.high}
        summary |= {f"guess_{number}": guess for number, guess in scores[0].guesses.items()}
    return summary


def rows_of(runs: Runs) -> list[dict[str, Any]]:
    """Every number and every point of every curve (those have a position) of every run."""
    rows: list[dict[str, Any]] = []
    for name, scores in runs.items():
        for run, own in enumerate(scores):
            who = {"export": name, "run": run}
            rows += [{**who, "number": number, **_described(value)} for number, value in own.numbers.items()]
            rows += [
                {**who, "curve": curve, "position": position, **_described(share)}
                for curve, points in own.curves.items()
                for position, share in enumerate(points.shares, start=points.first)
            ]
    return rows


def _described(value: Share | float) -> dict[str, Any]:
    if not isinstance(value, Share):
        return {"value": value}
    low, high = value.interval
    return {"value": value.value, "low": low, "high": high, "documents": value.total}


def table(task: Task, runs: Runs, documents: int) -> str:
    """A line per number, a column per name; what guessing reaches in the last one."""
    names = list(runs)
    guesses = {number: guess for scores in runs.values() for number, guess in scores[0].guesses.items()}
    numbers = list(dict.fromkeys(number for scores in runs.values() for number in scores[0].numbers))
    rows = [
        {"number": number, "guess": guesses.get(number)}
        | {
            f"column{place}": str(pooled(runs[name], number)) if number in runs[name][0].numbers else None
            for place, name in enumerate(names)
        }
        for number in numbers
    ]
    columns = {task.name: "{number}"}
    for place, name in enumerate(names):
        several = f", {len(runs[name])} runs" if len(runs[name]) > 1 else ""
        columns[f"{name}{several}"] = f"{{column{place}}}"
    columns["guess"] = "{guess:.3f}"
    brackets = "in brackets: 95% interval over documents; over several runs: lowest and highest"
    return f"{report.table(columns, rows)}\n{documents} documents; {brackets}"
