"""Planning and world-model tasks as data: what a document is, and what a right answer is. Needs numpy alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from nextlat_dist.data.shard_format import Manifest
from nextlat_dist.errors import UserError
from nextlat_dist.tasks.vocabulary import (
    BOS_ID,
    EOS_ID,
    FIRST_SYMBOL_ID,
    PAD_ID,
    Document,
    Split,
    Task,
    vocab_size,
    words_of,
)

__all__ = [
    "BOS_ID",
    "EOS_ID",
    "FIRST_SYMBOL_ID",
    "PAD_ID",
    "TASKS",
    "Document",
    "Split",
    "Task",
    "make_task",
    "task_class",
    "task_of",
    "vocab_size",
    "words_of",
]

# Module and class of every task; imported when asked for.
TASKS = {
    "path-star": ("path_star", "PathStar"),
    "countdown": ("countdown", "Countdown"),
    "state-tracking": ("state_tracking", "StateTracking"),
    "hmm": ("hmm", "Hmm"),
    "city": ("city", "City"),
}


def task_class(name: str) -> Callable[..., Task]:
    """The dataclass of a task; its fields are the parameters. Raises UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    module, class_name = TASKS[name]
    found: Callable[..., Task] = getattr(importlib.import_module(f"{__name__}.{module}"), class_name)
    return found


def make_task(name: str, parameters: Mapping[str, Any]) -> Task:
    """The task of these parameters, which may be `Task.parameters` read back from JSON.

    Raises:
        UserError: the name or a parameter is unknown, one is missing, or they make no task.
    """
    cls = task_class(name)
    known = [parameter.name for parameter in fields(cls)]  # type: ignore[arg-type]
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        raise UserError(f"task {name} has no parameter {unknown[0]!r}; its parameters are {', '.join(known)}")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()})
    except TypeError as error:
        raise UserError(f"task {name} cannot be made of {dict(parameters)} ({error}); give what is missing") from None


def task_of(manifest: Manifest) -> Task:
    """The task that a dataset was drawn from. Raises UserError where the dataset is not a task's."""
    written = manifest.report.get("task")
    if written is None:
        raise UserError(
            f"this dataset (split {manifest.split}, {manifest.documents} documents) is not a task's; give one that "
            "`nextlat-data task` wrote"
        )
    return make_task(written["name"], written["parameters"])
