"""Every task by name. One line adds one; a third party's is an entry point of the group `nextlat_dist.tasks`.

Invariant: what a dataset's manifest names is found here or among installed distributions, never imported from a path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any

from nextlat_dist.config.read import build
from nextlat_dist.data.shard_format import Manifest
from nextlat_dist.errors import UserError
from nextlat_dist.tasks.base import Task

GROUP = "nextlat_dist.tasks"
# module:class of our own tasks; imported when asked for.
TASKS = {
    "path-star": "nextlat_dist.tasks.path_star:PathStar",
    "countdown": "nextlat_dist.tasks.countdown:Countdown",
    "state-tracking": "nextlat_dist.tasks.state_tracking:StateTracking",
    "hmm": "nextlat_dist.tasks.hmm:Hmm",
    "city": "nextlat_dist.tasks.city:City",
}


def task_names() -> list[str]:
    """Ours, then those of installed distributions."""
    return [*TASKS, *sorted(point.name for point in entry_points(group=GROUP) if point.name not in TASKS)]


def task_class(name: str) -> Callable[..., Task]:
    """The dataclass of a task; its fields are the parameters. Raises UserError for an unknown name."""
    found: Callable[..., Task]
    if name in TASKS:
        module, _, class_name = TASKS[name].partition(":")
        found = getattr(importlib.import_module(module), class_name)
        return found
    for point in entry_points(group=GROUP, name=name):
        found = point.load()
        return found
    raise UserError(f"there is no task {name!r}; the tasks are {', '.join(task_names())}")


def make_task(name: str, parameters: Mapping[str, Any]) -> Task:
    """The task of these parameters, which may be `Task.parameters` read back from JSON.

    Raises:
        UserError: the name or a parameter is unknown, one is missing or of another type, or they make no task.
    """
    cls = task_class(name)
    known = [parameter.name for parameter in fields(cls)]  # type: ignore[arg-type]
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        raise UserError(f"task {name} has no parameter {unknown[0]!r}; its parameters are {', '.join(known)}")
    raw = {key: list(value) if isinstance(value, tuple) else value for key, value in parameters.items()}
    task: Task = build(cls, raw, f"task {name}")  # type: ignore[arg-type]
    return task


def task_of(manifest: Manifest) -> Task:
    """The task that a dataset was drawn from. Raises UserError where the dataset is not a task's."""
    written = manifest.report.get("task")
    if written is None:
        raise UserError(
            f"this dataset (split {manifest.split}, {manifest.documents} documents) is not a task's; give one that "
            "`nextlat-data task` wrote"
        )
    return make_task(written["name"], written["parameters"])
