"""State tracking: the transformer, and the latent predictor run alone as an RNN, by position.

The label after x_1 … x_i is their product. The transformer answers from h_i, having read every token. The latent RNN is
started at h_1, the state after x_1, and from there fed the input tokens alone: ĥ_{i+1} = p_ψ(ĥ_i, x_{i+1}); it answers
from ĥ_i through the same output head. At position 1 both are the same state.

Invariant: the RNN sees nothing of the transformer after h_1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.catalogue import TaskScorer
from nextlat_dist.evaluation.tasks.pictures import colors, draw_curve
from nextlat_dist.evaluation.tasks.scores import Curve, Runs, Sampled, Scores, Share, Watch, unwatched
from nextlat_dist.inference.state_model import ExportModel, StateModel
from nextlat_dist.reporting.pictures import panels
from nextlat_dist.tasks import Document
from nextlat_dist.tasks.state_tracking import StateTracking

ROWS = 256  # documents run together
REACHED = 0.9  # accuracy up to which a length counts as reached: the paper plots accuracy, and names no threshold
STYLES = {"transformer": "--", "latent_rnn": "-"}  # of the curves
PICTURE = "accuracy_by_length.png"
MULTIPLES = {"1x": Fraction(1), "4_3x": Fraction(4, 3), "2x": Fraction(2), "3x": Fraction(3)}  # of the training length


def score_tracking(
    model: StateModel, documents: Sequence[Document], task: StateTracking, watch: Watch = unwatched
) -> Scores:
    """Label accuracy by position (= tokens of the word read) of the transformer and, if there is one, the latent RNN.

    `numbers` has both at the training length and at 4/3, 2 and 3 times that (the nearest position), as far as
    the documents reach: `transformer_1x`, `latent_rnn_4_3x`, …; and `…_whole_1x`, the share of documents whose labels
    are right at every position up to there. `…_reach` is the last position up to which accuracy is REACHED throughout.

    Raises:
        UserError: a document has no labels.
    """
    right: dict[str, list[np.ndarray]] = {"transformer": []}
    if model.has_predictor:
        right["latent_rnn"] = []
    first = documents[0].prompt_tokens - 1
    batches = _batches(documents)
    progress = watch("reading", len(batches))
    for batch in batches:
        tokens = torch.from_numpy(np.stack([document.tokens for document in batch]))[:, :-1]
        labels = torch.from_numpy(np.stack([_labels(document) for document in batch]))[:, first + 1 :]
        states = model.states(tokens)[:, first:]
        right["transformer"] += list(_right(model, states, labels))
        if model.has_predictor:
            right["latent_rnn"] += list(_right(model, run_alone(model, states[:, 0], tokens[:, first + 1 :]), labels))
        progress.add(tokens.numel())
    scores = Scores(curves={name: Curve.of(first, rows) for name, rows in right.items()})
    for name, curve in scores.curves.items():
        missed = (index for index, share in enumerate(curve.shares) if share.value < REACHED)
        scores.numbers[f"{name}_reach"] = float(first - 1 + next(missed, len(curve.shares)))
    for multiple, ratio in MULTIPLES.items():
        length = round(task.length * ratio)
        for name, curve in scores.curves.items():
            if first <= length <= curve.last:
                scores.numbers[f"{name}_{multiple}"] = curve.at(length)
                scores.guesses[f"{name}_{multiple}"] = 1 / task.world.order
        for name, rows in right.items():
            reached = [row[: length - first + 1] for row in rows if len(row) > length - first]
            if reached:
                scores.numbers[f"{name}_whole_{multiple}"] = Share.of(bool(row.all()) for row in reached)
    return scores


def run_alone(model: StateModel, start: Tensor, tokens: Tensor) -> Tensor:
    """start [b, hidden], tokens [b, n] that follow it → states [b, n + 1, hidden], `start` first."""
    states = [start]
    for position in range(tokens.shape[1]):
        states.append(model.advance(states[-1], tokens[:, position]))
    return torch.stack(states, dim=1)


def _right(model: StateModel, states: Tensor, labels: Tensor) -> np.ndarray:
    """bool [b, n]: whether the likeliest token is the label."""
    return (model.logits(states).argmax(dim=-1).cpu() == labels).numpy()


def _labels(document: Document) -> np.ndarray:
    if document.labels is None:
        raise UserError("the documents have no labels; write the data again with `nextlat-data task state-tracking`")
    return document.labels


def _batches(documents: Sequence[Document]) -> list[list[Document]]:
    """Documents of one length together, at most ROWS at a time."""
    assert len({document.prompt_tokens for document in documents}) == 1
    lengths: dict[int, list[Document]] = {}
    for document in documents:
        lengths.setdefault(len(document.tokens), []).append(document)
    return [group[start : start + ROWS] for group in lengths.values() for start in range(0, len(group), ROWS)]


def _score(
    model: ExportModel, task: StateTracking, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    return score_tracking(model, documents, task, watch)


def _pictures(task: StateTracking, runs: Runs) -> Mapping[str, Callable[[], Figure]]:
    return {PICTURE: lambda: _figure(task, runs)}


def _figure(task: StateTracking, runs: Runs) -> Figure:
    figure, (axis,) = panels(1, f"State tracking, {task.group or 'a group'} of {task.world.order} elements")
    for (name, scores), color in zip(runs.items(), colors(runs), strict=True):
        for curve in scores[0].curves:
            style = {"color": color, "linestyle": STYLES[curve], "label": f"{name}, {curve.replace('_', ' ')}"}
            draw_curve(axis, [own.curves[curve] for own in scores], style)
    axis.axvline(task.length, color="black", linewidth=0.8, linestyle=":", label="training length")
    axis.axhline(1 / task.world.order, color="grey", linewidth=0.8, label="guessing")
    axis.set(xlabel="elements read", ylabel="right products", ylim=(0, 1.02))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=7)
    return figure


SCORER = TaskScorer(_score, _pictures)
