"""What is measured on each task: one function per task, from an export and documents to `Scores`.

Names of numbers end with how they were taken: `_greedy`, `_t1` (free-running, sampled at temperature 1),
`_teacher_forced`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.latents import Latents
from nextlat_dist.evaluation.task_answers import agreement, open_decoder, teacher_forced, write_answers
from nextlat_dist.evaluation.task_scores import Curve, Scores, Share, Watch
from nextlat_dist.evaluation.task_tracking import score_tracking
from nextlat_dist.tasks import Document, Task
from nextlat_dist.tasks.path_star import PathStar
from nextlat_dist.tasks.state_tracking import StateTracking

ARM = 1  # place in a path of the first node that depends on the goal; before it comes the start


@dataclass(frozen=True)
class Sampled:
    """How free-running answers are drawn."""

    temperatures: tuple[float, ...]  # 0: greedy
    seed: int


def how(temperature: float) -> str:
    """End of a number's name."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


def score_export(export: Path, task: Task, documents: Sequence[Document], sampled: Sampled, watch: Watch) -> Scores:
    """The scores of one export on documents of the task.

    Raises:
        UserError: the task is scored by another command.
    """
    if isinstance(task, StateTracking):
        return score_tracking(Latents(export), documents, task, watch)
    if isinstance(task, PathStar):
        return score_path_star(export, task, documents, sampled, watch)
    raise UserError(f"task {task.name} has no answers to score; use `nextlat evaluate belief` for a hidden process")


def score_path_star(
    export: Path, task: PathStar, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    """`exact_…`: the whole path and EOS; `arm_…`: the node behind the start, the only one that needs planning."""
    scores = score_answers(export, documents, sampled, watch, lambda document, written: {})
    for name, curve in list(scores.curves.items()):
        scores.numbers[f"arm_{name}"] = curve.at(ARM + 1)
    scores.guesses = {name: 1 / task.arms for name in scores.numbers if name.startswith(("exact", "arm"))}
    return scores


def score_answers(
    export: Path,
    documents: Sequence[Document],
    sampled: Sampled,
    watch: Watch,
    judge: Callable[[Document, np.ndarray], dict[str, bool]],
) -> Scores:
    """Every answer held against the true one, by position and as a whole, and judged by the rules of the task.

    Args:
        judge: the named verdicts on a written answer.
    """
    right = teacher_forced(Latents(export), documents, watch)
    scores = Scores(curves={"teacher_forced": Curve.of(1, right)})
    scores.numbers["tokens_teacher_forced"] = float(np.concatenate(right).mean())
    decoder = open_decoder(export, max(len(document.tokens) for document in documents))
    for temperature in sampled.temperatures:
        written = write_answers(decoder, documents, temperature, sampled.seed, watch)
        pairs = list(zip(documents, written, strict=True))
        agreed = [agreement(*pair) for pair in pairs]
        scores.curves[how(temperature)] = Curve.of(1, agreed)
        scores.numbers[f"exact_{how(temperature)}"] = Share.of(bool(own.all()) for own in agreed)
        verdicts = [judge(*pair) for pair in pairs]
        for name in verdicts[0]:
            scores.numbers[f"{name}_{how(temperature)}"] = Share.of(verdict[name] for verdict in verdicts)
    return scores
