"""Scores of any answer: its tokens by position and whether all of it is right, teacher-forced and free-running.

The scorer of every task that has none of its own, and the beginning of those that judge answers by rules.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.answers import agreement, teacher_forced, write_answers
from nextlat_dist.evaluation.tasks.catalogue import TaskScorer
from nextlat_dist.evaluation.tasks.pictures import answer_pictures
from nextlat_dist.evaluation.tasks.scores import Curve, Sampled, Scores, Share, Watch, how
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import Document, Task


def score_answers(
    model: ExportModel, task: Task, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    """`exact_…`: the whole answer and what ends it.

    Raises:
        UserError: the documents ask nothing.
    """
    if min(document.prompt_tokens for document in documents) < 2:  # BOS alone asks nothing
        raise UserError(f"task {task.name} has no answers to score; use `nextlat evaluate belief` for a hidden process")
    scores, written = read_and_write(model, documents, sampled, watch)
    scores.numbers |= exact(documents, written)
    return scores


def exact(
    documents: Sequence[Document], written: dict[str, list[np.ndarray]], tokens: int | None = None
) -> dict[str, Share]:
    """`exact_{how}`: share of documents whose written answer is the true one; `tokens`: so many of it are asked, None:
    all, and what ends it.
    """
    found = {}
    for name, answers in written.items():
        right = (agreement(*pair)[:tokens].all() for pair in zip(documents, answers, strict=True))
        found[f"exact_{name}"] = Share.of(map(bool, right))
    return found


def read_and_write(
    model: ExportModel, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> tuple[Scores, dict[str, list[np.ndarray]]]:
    """What holds for answers of every kind: agreement with the true ones by position, teacher-forced and free-running;
    and the written answers by how they were drawn, for judging.
    """
    right = teacher_forced(model, documents, watch)
    scores = Scores(curves={"teacher_forced": Curve.of(1, right)})
    scores.numbers["tokens_teacher_forced"] = float(np.concatenate(right).mean())
    decoder = model.decoder(max(len(document.tokens) for document in documents))
    written: dict[str, list[np.ndarray]] = {}
    for temperature in sampled.temperatures:
        answers = write_answers(decoder, documents, temperature, sampled.seed, watch)
        written[how(temperature)] = answers
        scores.curves[how(temperature)] = Curve.of(
            1, [agreement(*pair) for pair in zip(documents, answers, strict=True)]
        )
    return scores, written


SCORER = TaskScorer(score_answers, answer_pictures)
