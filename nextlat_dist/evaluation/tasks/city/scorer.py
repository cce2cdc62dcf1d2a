"""City: the scores of an export as a walker, with the map that it believes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from nextlat_dist.evaluation.tasks.catalogue import TaskScorer
from nextlat_dist.evaluation.tasks.city.map import map_figure
from nextlat_dist.evaluation.tasks.city.scores import CityScores, score_city
from nextlat_dist.evaluation.tasks.city.walker import ExportWalker
from nextlat_dist.evaluation.tasks.pictures import answer_pictures
from nextlat_dist.evaluation.tasks.scores import Runs, Sampled, Scores, Watch
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import Document
from nextlat_dist.tasks.city import PROMPT_TOKENS, City

MAP_PICTURE = "map.png"


def score(model: ExportModel, task: City, documents: Sequence[Document], sampled: Sampled, watch: Watch) -> Scores:
    """See `city.scores`."""
    walker = ExportWalker(model, task.max_turns + PROMPT_TOKENS + 1)
    return score_city(walker, task, documents, temperatures=sampled.temperatures, seed=sampled.seed, watch=watch)


def pictures(task: City, runs: Runs) -> Mapping[str, Callable[[], Figure]]:
    """Accuracy by position, and the maps that the first runs believe in."""
    firsts = {name: scores[0] for name, scores in runs.items()}
    driven = {name: first.driven for name, first in firsts.items() if isinstance(first, CityScores)}
    return {**answer_pictures(task, runs), MAP_PICTURE: lambda: map_figure(task, driven)}


SCORER = TaskScorer(score, pictures)
