"""Every task that is scored in its own way, one line each; all others have the scores of any answer.

To score a new task in its own way, write `scorers/NAME.py` with a `SCORER` and add its line. A third party's scorer is
an entry point of the group `nextlat_dist.task_scorers`: task name = `module:TaskScorer`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from nextlat_dist.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nextlat_dist.evaluation.tasks.scores import Runs, Sampled, Scores, Watch
    from nextlat_dist.inference.state_model import ExportModel
    from nextlat_dist.tasks import Document

ENTRY_POINTS = "nextlat_dist.task_scorers"
# The module of every scorer; imported when asked for.
SCORERS = {
    "path-star": "nextlat_dist.evaluation.tasks.scorers.path_star",
    "countdown": "nextlat_dist.evaluation.tasks.scorers.countdown",
    "state-tracking": "nextlat_dist.evaluation.tasks.scorers.state_tracking",
    "city": "nextlat_dist.evaluation.tasks.city.scorer",
}
ANY_ANSWER = "nextlat_dist.evaluation.tasks.scorers.answered"


@dataclass(frozen=True)
class TaskScorer:
    """How exports are scored on a task, and what is drawn of their scores.

    Attributes:
        score: (export, task, documents, how answers are sampled, progress) → scores. Names of numbers end with how
            they were taken: `_greedy`, `_t1` (free-running, sampled at temperature 1), `_teacher_forced`.
        pictures: (task, scores by name of the export) → file name → draws the figure.
        solved: a number, and what it is at least of a run that solves the task, where runs either do or do not.
    """

    score: Callable[[ExportModel, Any, Sequence[Document], Sampled, Watch], Scores]
    pictures: Callable[[Any, Runs], Mapping[str, Callable[[], Figure]]]
    solved: tuple[str, float] | None = None


def scorer_of(task: str) -> TaskScorer:
    """By the name of the task.

    Raises:
        UserError: an installed scorer is none.
    """
    if task not in SCORERS:
        for point in entry_points(group=ENTRY_POINTS, name=task):
            found = point.load()
            if not isinstance(found, TaskScorer):
                raise UserError(
                    f"the entry point {task} of {ENTRY_POINTS} is a {type(found).__name__}, but must be a TaskScorer; "
                    "change the distribution that brings it"
                )
            return found
    scorer: TaskScorer = importlib.import_module(SCORERS.get(task, ANY_ANSWER)).SCORER
    return scorer
