"""Scores of exports on a task, side by side.

    evaluate_task(exports: ["gpt=DIR", "nextlat=DIR", …], data: Path, *, documents=1000, temperatures=(0.0, 1.0),
                  seed=0, progress=True) -> Report

All exports answer the same documents, the first ones of the dataset; how a task is scored stands in `tasks.catalogue`.
Exports of one name are runs (seeds) of it: what is reported of a name is the mean over its runs, with the lowest and
the highest. Invariant: every export is opened once.

Command: `nextlat evaluate task --export gpt=DIR nextlat=DIR --data DIR/test --json FILE --pictures DIR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.exports import named_exports
from nextlat_dist.evaluation.tasks import data as task_data
from nextlat_dist.evaluation.tasks.catalogue import scorer_of
from nextlat_dist.evaluation.tasks.page import task_report
from nextlat_dist.evaluation.tasks.scores import Sampled, Scores
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.reporting.console import Progress
from nextlat_dist.reporting.report import Report
from nextlat_dist.tasks import task_of


def evaluate_task(
    exports: Sequence[str],
    data: Path,
    *,
    documents: int = 1000,
    temperatures: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Score every export.

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
    scorer = scorer_of(task.name)
    opened = [open_export(export.path) for export in named]
    for export in opened:
        _check_vocabulary(export, manifest, data)
    asked = list(task_data.documents(data, documents))
    sampled = Sampled(tuple(sorted(set(temperatures))), seed)
    runs: dict[str, list[Scores]] = {}
    for export, entry in zip(opened, named, strict=True):
        label = f"{entry.name} {entry.run}"

        def watch(what: str, total: int, label: str = label) -> Progress:
            return Progress(f"{label}, {what}", total, progress)

        scores = scorer.score(ExportModel(export), task, asked, sampled, watch)
        first = runs.setdefault(entry.name, [scores])[0]
        if scores.numbers.keys() != first.numbers.keys():
            raise UserError(
                f"{entry.path} is called {entry.name!r} as another export is, but only one of them has a latent "
                "predictor; give them different names with --export name=DIR"
            )
        if scores is not first:
            runs[entry.name].append(scores)
    options = {"task": task.name, "parameters": task.parameters, "temperatures": sampled.temperatures, "seed": seed}
    return task_report(options, task, runs, len(asked), scorer.pictures(task, runs), scorer.solved)


def _check_vocabulary(export: OpenedExport, manifest: Manifest, data: Path) -> None:
    known = export.config.vocab_size
    if known < manifest.tokenizer.vocab_size:
        raise UserError(
            f"{export.path} knows {known} token ids, but {data} has {manifest.tokenizer.vocab_size}; give an export "
            "trained on this task"
        )
