"""Scorers by the name of a task: built-in ones, what every task with answers has, and those that others install."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import data_tools.cli
from nextlat_dist import cli
from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.catalogue import SCORERS, TaskScorer, scorer_of
from nextlat_dist.evaluation.tasks.scorers import answered
from nextlat_dist.evaluation.tasks.scorers.path_star import score_path_star
from nextlat_dist.evaluation.tasks.scores import Sampled, Share, unwatched
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import EOS_ID, TASKS, make_task, task_names
from nextlat_dist.tasks.path_star import PathStar
from tests.kit.exports import random_weights, tiny_config, write_export
from tests.kit.task_exports import following_export, question

ECHO = '''
from dataclasses import asdict, dataclass, field
import numpy as np
from nextlat_dist.tasks import Document

@dataclass(frozen=True)
class Echo:
    """Say a word again."""

    words: int = field(default=4, metadata={"help": "that there are"})
    name = "echo"

    @property
    def parameters(self):
        return asdict(self)

    @property
    def symbols(self):
        return tuple(f"w{index}" for index in range(self.words))

    def sample(self, rng, split):
        word = 4 + 2 * int(rng.integers(self.words // 2)) + (split == "test")
        return Document(np.array([1, word, word, 2]), 2, bytes([word]))
'''
ECHO_SCORER = """
from nextlat_dist.evaluation.tasks.catalogue import TaskScorer
from nextlat_dist.evaluation.tasks.scores import Scores

def score(model, task, documents, sampled, watch):
    return Scores({"vocabulary": float(model.vocab_size), "words": float(task.words)})

SCORER = TaskScorer(score, lambda task, runs: {})
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution that brings the task echo, as an installer would lay it out."""
    site = tmp_path / "site"
    (site / "echo_task-1.0.dist-info").mkdir(parents=True)
    (site / "echo_task-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-task\nVersion: 1.0\n")
    (site / "echo_task.py").write_text(ECHO)
    (site / "echo_scorer.py").write_text(ECHO_SCORER)
    monkeypatch.syspath_prepend(str(site))
    yield site
    for name in ("echo_task", "echo_scorer"):
        sys.modules.pop(name, None)


def declare(site: Path, *lines: str) -> None:
    (site / "echo_task-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("task", SCORERS)
def test_every_built_in_scorer_is_there(task: str) -> None:
    assert task in TASKS
    assert isinstance(scorer_of(task), TaskScorer)


def test_a_task_without_its_own_has_the_scores_of_any_answer(tmp_path: Path) -> None:
    assert scorer_of("of-nobody") is answered.SCORER
    model = ExportModel(following_export(tmp_path, {4: 5, 5: 6, 6: EOS_ID}))
    documents = [question(10, 4, answer=[5, 6, EOS_ID]), question(10, 4, answer=[7, 6, EOS_ID])]
    task = PathStar(arms=2, length=3, nodes=20)
    scores = answered.score_answers(model, task, documents, Sampled((0.0,), 0), unwatched)
    assert scores.numbers["exact_greedy"] == Share(1, 2)
    own = score_path_star(model, task, documents, Sampled((0.0,), 0), unwatched)
    assert scores.numbers == {name: own.numbers[name] for name in ("exact_greedy", "tokens_teacher_forced")}
    assert answered.SCORER.pictures(task, {"a": [scores]}).keys() == {"accuracy_by_position.png"}


def evaluate(tmp_path: Path) -> dict[str, float]:
    config = tiny_config(vocab_size=64)
    export = write_export(tmp_path / "export", config, random_weights(config), None)
    where = ["--data", str(tmp_path / "data" / "test"), "--json", str(tmp_path / "out.json")]
    assert cli.main(["evaluate", "task", "--export", f"a={export}", *where]) == 0
    summary: dict[str, float] = json.loads((tmp_path / "out.json").read_text())["summary"]
    return summary


def test_an_installed_task_is_written_trained_on_and_scored(installed: Path, tmp_path: Path) -> None:
    declare(installed, "[nextlat_dist.tasks]", "echo = echo_task:Echo")
    assert task_names() == [*TASKS, "echo"]
    data = ["--output", str(tmp_path / "data"), "--train", "20", "--test", "20"]
    assert data_tools.cli.main(["task", "echo", "--words", "60", *data]) == 0
    summary = evaluate(tmp_path)
    assert {"a_exact_greedy", "a_exact_t1", "a_tokens_teacher_forced"} <= summary.keys()
    declare(
        installed,
        "[nextlat_dist.tasks]",
        "echo = echo_task:Echo",
        "[nextlat_dist.task_scorers]",
        "echo = echo_scorer:SCORER",
    )
    assert evaluate(tmp_path) == {"a_vocabulary": 64, "a_words": 60, "documents": 20}


def test_what_is_no_scorer_is_named(installed: Path) -> None:
    declare(installed, "[nextlat_dist.task_scorers]", "echo = echo_task:Echo")
    with pytest.raises(UserError, match=r"echo of nextlat_dist\.task_scorers is a type, but must be a TaskScorer"):
        scorer_of("echo")
    with pytest.raises(UserError, match="there is no task 'echo'; the tasks are path-star, "):
        make_task("echo", {})
