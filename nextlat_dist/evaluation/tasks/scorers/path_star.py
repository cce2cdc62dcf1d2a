"""Path-Star: whether the whole path is right, and whether its arm is, the only node that needs planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from nextlat_dist.evaluation.tasks.catalogue import TaskScorer
from nextlat_dist.evaluation.tasks.pictures import answer_pictures
from nextlat_dist.evaluation.tasks.scorers.answered import exact, read_and_write
from nextlat_dist.evaluation.tasks.scores import Runs, Sampled, Scores, Watch
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import Document
from nextlat_dist.tasks.path_star import PathStar

ARM = 1  # index in the answer of the first node that depends on the goal; before it comes the start


def score_path_star(
    model: ExportModel, task: PathStar, documents: Sequence[Document], sampled: Sampled, watch: Watch
) -> Scores:
    """`exact_…`: the whole path, whatever comes after it (bst learns no end from pairs of gap 2); `arm_…`: the node
    after the start.
    """
    scores, written = read_and_write(model, documents, sampled, watch)
    scores.numbers |= exact(documents, written, tokens=task.length)
    for name, curve in scores.curves.items():
        scores.numbers[f"arm_{name}"] = curve.at(ARM + 1)
    scores.guesses = {name: 1 / task.arms for name in scores.numbers if name.startswith(("exact", "arm"))}
    return scores


def pictures(task: PathStar, runs: Runs) -> Mapping[str, Callable[[], Figure]]:
    return answer_pictures(task, runs, guess=1 / task.arms, guessing="guessing an arm")


# A run that does not plan stays at 1 / arms; one that does is far above it, and near 1 when it has time.
SCORER = TaskScorer(score_path_star, pictures, solved=("exact_greedy", 0.9))
