"""What is measured on each task: one function per task, from an export and documents to `Scores`.

Names of numbers end with how they were taken: `_greedy`, `_t1` (free-running, sampled at temperature 1),
`_teacher_forced`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.state_model import Latents
from nextlat_dist.evaluation.tasks.answers import agreement, before_end, open_decoder, teacher_forced, write_answers
from nextlat_dist.evaluation.tasks.city.scores import score_city
from nextlat_dist.evaluation.tasks.city.walker import ExportWalker
from nextlat_dist.evaluation.tasks.scores import Curve, Scores, Share, Watch
from nextlat_dist.evaluation.tasks.tracking import score_tracking
from nextlat_dist.tasks import Document, Task, words_of
from nextlat_dist.tasks.city import PROMPT_TOKENS, City
from nextlat_dist.tasks.countdown import Countdown, CountdownVerdict, judge
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
    if isinstance(task, Countdown):
        return score_countdown(export, task, documents, sampled, watch)
    if isinstance(task, City):
        walker = ExportWalker(export, task.max_turns + PROMPT_TOKENS + 1)
        return score_city(walker, task, documents, temperatures=sampled.temperatures, seed=sampled.seed, watch=watch)
    raise UserError(f"task {task.name} has no answers to score; use `nextlat evaluate belief` for a hidden process")


def score_path_star(
    export: Path, task: PathStar, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    """`exact_…`: the whole path and EOS; `arm_…`: the node behind the start, the only one that needs planning."""
    scores, written = read_and_write(export, documents, sampled, watch)
    for name, answers in written.items():
        agreed = [agreement(*pair) for pair in zip(documents, answers, strict=True)]
        scores.numbers[f"exact_{name}"] = Share.of(bool(own.all()) for own in agreed)
    for name, curve in scores.curves.items():
        scores.numbers[f"arm_{name}"] = curve.at(ARM + 1)
    scores.guesses = {name: 1 / task.arms for name in scores.numbers if name.startswith(("exact", "arm"))}
    return scores


def score_countdown(
    export: Path, task: Countdown, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    """Answers by the rules, see `add_verdicts`."""
    scores, written = read_and_write(export, documents, sampled, watch)
    for name, answers in written.items():
        verdicts = [
            judge(*task.problem(document.tokens), words_of(task, before_end(answer)))
            for document, answer in zip(documents, answers, strict=True)
        ]
        add_verdicts(scores, name, verdicts, task.inputs - 1)
    return scores


def add_verdicts(scores: Scores, name: str, verdicts: Sequence[CountdownVerdict], equations: int) -> None:
    """`solved_…`: share of answers that reach the target by the rules, whichever way; `valid_…`: that keep to the rules
    in every equation; `solved_of_valid_…`: share of those that reach the target. The curve `equations_…` is the
    validity of each of the `equations` that an answer needs; one that is missing is not valid.
    """
    solved = Share.of(verdict.solved for verdict in verdicts)
    valid = Share.of(all(verdict.equations) for verdict in verdicts)
    scores.numbers |= {
        f"solved_{name}": solved,
        f"valid_{name}": valid,
        f"solved_of_valid_{name}": Share(solved.right, valid.right),
    }
    missing = (False,) * equations
    rows = [np.array((*verdict.equations, *missing)[:equations]) for verdict in verdicts]
    scores.curves[f"equations_{name}"] = Curve.of(1, rows)


def read_and_write(
    export: Path, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> tuple[Scores, dict[str, list[np.ndarray]]]:
    """What holds for answers of every kind: agreement with the true ones by position, teacher-forced and free-running;
    and the written answers by how they were drawn, for judging.
    """
    right = teacher_forced(Latents(export), documents, watch)
    scores = Scores(curves={"teacher_forced": Curve.of(1, right)})
    scores.numbers["tokens_teacher_forced"] = float(np.concatenate(right).mean())
    decoder = open_decoder(export, max(len(document.tokens) for document in documents))
    written: dict[str, list[np.ndarray]] = {}
    for temperature in sampled.temperatures:
        answers = write_answers(decoder, documents, temperature, sampled.seed, watch)
        written[how(temperature)] = answers
        scores.curves[how(temperature)] = Curve.of(
            1, [agreement(*pair) for pair in zip(documents, answers, strict=True)]
        )
    return scores, written
