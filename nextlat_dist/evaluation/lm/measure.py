"""What an export scores on the benchmarks of language models: EleutherAI's lm-evaluation-harness, asked for one table.

    evaluate_lm(exports: Sequence[str], tasks=PAPER_TASKS, *, include_path=None, limit=None, batch_size=8,
                json_path=None) -> dict

The harness does all of it: prompts, scoring, standard errors, data sets (from the Hugging Face Hub, or its cache). An
export is a plain Llama to it; the latent predictor plays no part. One thing is put right: running text (wikitext) has
one BOS in front as in training, where the harness by itself would have two.

Command: `nextlat evaluate lm --export [name=]DIR … [--tasks paper] --json FILE`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.exports import NamedExport, named_exports

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
BOOTSTRAPS = 100  # resamples for the standard error of what is no mean, such as a perplexity


def evaluate_lm(
    exports: Sequence[str],
    tasks: Sequence[str] = PAPER_TASKS,
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    json_path: Path | None = None,
) -> dict[str, Any]:
    """Run the harness on every export, print the scores side by side, write JSON where asked, and return its content.

    Args:
        exports: `[name=]DIR` each, written by `nextlat export`.
        tasks: the harness's tasks, groups and tags.
        include_path: a folder of tasks of your own (the harness's YAML files).
        limit: the first documents of each task only; a trial, not a score.
        batch_size: rows scored together.

    Raises:
        UserError: no export, the harness is not installed, a task is unknown, or its data set cannot be fetched.
    """
    from nextlat_dist.reporting import report

    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError(f"--batch-size is {batch_size} and --limit {limit}, but both must be ≥ 1; change the lower one")
    directories = _by_name(named_exports(exports))
    for directory in directories.values():
        if not (directory / "config.json").is_file():
            raise UserError(f"--export {directory} has no config.json; name a directory that `nextlat export` wrote")
    manager, loaded = _load_tasks(tasks, include_path)
    rows: list[dict[str, Any]] = []
    for name, directory in directories.items():
        rows += _rows(name, _run(directory, manager, loaded, limit, batch_size))
    summary = {f"{row['export']}_{row['task']}_{row['metric']}": row["value"] for row in rows}
    options = {"tasks": list(tasks), "limit": limit, "batch_size": batch_size}
    content = report.envelope(COMMAND, options, summary, rows)
    content["versions"]["lm-eval"] = importlib.metadata.version("lm-eval")
    columns, lines = _side_by_side(rows)
    print(report.table(columns, lines))
    if limit is not None:
        print(f"only the first {limit} documents of each task: a trial, not a score")
    if json_path is not None:
        report.write_json(json_path, content)
    return content


def _by_name(exports: Sequence[NamedExport]) -> dict[str, Path]:
    """The second run of a name is called NAME-2, and so on."""
    return {export.name if export.run == 0 else f"{export.name}-{export.run + 1}": export.path for export in exports}


def _load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[Any, list[Any]]:
    """The harness's task manager, and its tasks and groups: what is missing is known before a model is loaded."""
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise UserError(
            f"{COMMAND} needs lm-evaluation-harness, which is not installed; run `pip install 'nextlat-dist[eval]'`"
        ) from None
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path} is no folder; name one with the YAML files of tasks")
    folder = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads the harness's own thousands of files, for seconds
    loaded: list[Any] = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UserError(
                f"--tasks names {name!r}, which lm-evaluation-harness does not know"
                + (f"; the nearest name is {near[0]!r}" if near else "; `lm-eval ls tasks` lists what it does")
            )
        try:
            found = manager.load(name)
        except (OSError, ValueError) as error:  # what `datasets` raises for a data set that is not to be had
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"the data set of task {name} cannot be fetched ({reason}); connect to the Hugging Face Hub (and unset "
                "HF_HUB_OFFLINE), or run the command once on a connected machine and copy its HF_HOME here, or leave "
                f"{name} out of --tasks"
            ) from error
        groups = found.get("groups", {})
        loaded += [groups[name]] if name in groups else found["tasks"].values()
    return manager, loaded


def _run(export: Path, manager: Any, tasks: list[Any], limit: int | None, batch_size: int) -> dict[str, Any]:
    import torch
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]

    class OneBos(HFLM):
        """Running text as in training, behind one BOS. The harness puts one in front of what the tokenizer gives, which
        begins with BOS already, and would score that too.
        """

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            self.add_bos_token: bool | None = False
            try:
                return list(super().loglikelihood_rolling(requests, disable_tqdm))
            finally:
                self.add_bos_token = None  # the tokenizer's own way

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = simple_evaluate(
        OneBos(str(export), device=device, batch_size=batch_size),
        tasks=tasks,
        task_manager=manager,  # or it reads all its files again
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
    )
    assert found is not None, "rank 0 alone evaluates"
    return dict(found)


def _rows(export: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task and metric; a metric's key is `metric,filter`, the filter shown where it is not `none`."""
    rows = []
    for task, scores in found["results"].items():
        for key, value in scores.items():
            metric, separator, kept = key.partition(",")
            if not separator or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kept}")
            rows.append(
                {
                    "export": export,
                    "task": task,
                    "metric": metric if kept == "none" else f"{metric}.{kept}",
                    "value": float(value),
                    "stderr": error if isinstance(error, float) else None,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "documents": found["n-samples"].get(task, {}).get("effective"),
                    "shots": found["n-shot"].get(task),
                    "task_version": found["versions"].get(task),
                }
            )
    return rows


def _side_by_side(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Columns and lines of the table: a line per task and metric, a column per export."""
    names = list(dict.fromkeys(row["export"] for row in rows))
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        better = {True: "↑", False: "↓", None: ""}[row["higher_is_better"]]
        start = {"task": row["task"], "metric": row["metric"] + better, "documents": row["documents"]}
        line = lines.setdefault((row["task"], row["metric"]), start)
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
        line[f"export_{names.index(row['export'])}"] = f"{row['value']:.4f}{error}"
    columns = {"task": "{task}", "metric": "{metric}", "documents": "{documents}"}
    columns |= {name: f"{{export_{index}}}" for index, name in enumerate(names)}
    return columns, list(lines.values())
