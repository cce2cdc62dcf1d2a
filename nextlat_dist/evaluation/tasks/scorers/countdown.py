"""Countdown: answers judged by the rules of the game, whichever way they reach the target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nextlat_dist.evaluation.tasks.answers import before_end
from nextlat_dist.evaluation.tasks.catalogue import TaskScorer
from nextlat_dist.evaluation.tasks.pictures import answer_pictures
from nextlat_dist.evaluation.tasks.scorers.answered import read_and_write
from nextlat_dist.evaluation.tasks.scores import Curve, Sampled, Scores, Share, Watch
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import Document, words_of
from nextlat_dist.tasks.countdown import Countdown, CountdownVerdict, judge


def score_countdown(
    model: ExportModel, task: Countdown, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    """Answers by the rules, see `add_verdicts`."""
    scores, written = read_and_write(model, documents, sampled, watch)
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


SCORER = TaskScorer(score_countdown, answer_pictures)
