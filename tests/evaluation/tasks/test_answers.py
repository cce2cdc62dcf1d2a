"""Answers of models that always write the same token after the same one, against counts by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from nextlat_dist.evaluation.tasks import answers as task_answers
from nextlat_dist.evaluation.tasks.answers import agreement, before_end, teacher_forced, write_answers
from nextlat_dist.evaluation.tasks.scorers.answered import exact, read_and_write, score_answers
from nextlat_dist.evaluation.tasks.scorers.countdown import add_verdicts, score_countdown
from nextlat_dist.evaluation.tasks.scorers.path_star import score_path_star
from nextlat_dist.evaluation.tasks.scores import Sampled, Scores, Share, unwatched
from nextlat_dist.inference import Decoder
from nextlat_dist.inference.state_model import ExportModel
from nextlat_dist.tasks import EOS_ID, FIRST_SYMBOL_ID, Document
from nextlat_dist.tasks.countdown import Countdown, CountdownVerdict
from nextlat_dist.tasks.path_star import PathStar
from tests.kit.exports import random_weights, tiny_config, write_export
from tests.kit.task_exports import following_export, question

FOLLOWING = {4: 5, 5: 6, 6: EOS_ID, 7: 8, 9: 4}


DOCUMENTS = [
    question(10, 4, answer=[5, 6, EOS_ID]),  # written: 5 6 EOS
    question(10, 4, answer=[7, 6, EOS_ID]),  # written: 5 6 EOS
    question(5, answer=[6, EOS_ID]),  # written: 6 EOS
    question(10, 11, 9, answer=[4, 7, 6, EOS_ID]),  # written: 4 5 6 EOS
]


@pytest.fixture(scope="module")
def follower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return following_export(tmp_path_factory.mktemp("export"), FOLLOWING)


def test_teacher_forced_answers_go_by_the_true_tokens(follower: Path) -> None:
    right = [row.tolist() for row in teacher_forced(ExportModel(follower), DOCUMENTS, unwatched)]
    # After 7 comes 8, which is never right.
    assert right == [[True, True, True], [False, False, True], [True, True], [True, False, False, True]]


def test_free_running_answers_go_by_their_own(follower: Path) -> None:
    written = write_answers(ExportModel(follower).decoder(0), DOCUMENTS, 0.0, 0, unwatched)
    assert [row.tolist() for row in written] == [[5, 6, EOS_ID], [5, 6, EOS_ID], [6, EOS_ID], [4, 5, 6, EOS_ID]]
    agreed = [agreement(*pair).tolist() for pair in zip(DOCUMENTS, written, strict=True)]
    assert agreed == [[True, True, True], [False, True, True], [True, True], [True, False, True, True]]


def test_missing_tokens_are_wrong_and_further_ones_do_not_count_by_position() -> None:
    document = question(4, answer=[5, 6, EOS_ID])
    assert agreement(document, np.array([5])).tolist() == [True, False, False]
    assert agreement(document, np.array([5, 6, 7, EOS_ID])).tolist() == [True, True, False]


def test_an_exact_answer_has_its_end() -> None:
    document = question(4, answer=[5, 6, EOS_ID])
    written = {"greedy": [5, 6, EOS_ID], "cut": [5, 6], "more": [5, 6, 7], "late": [5, 6, 7, EOS_ID], "none": []}
    scores = exact([document], {name: [np.array(tokens, dtype=np.int64)] for name, tokens in written.items()})
    assert scores["exact_greedy"] == Share(1, 1)
    assert {name: scores[f"exact_{name}"] for name in written if name != "greedy"} == dict.fromkeys(
        ("cut", "more", "late", "none"), Share(0, 1)
    )


def test_an_answer_that_goes_on_is_not_exact(tmp_path: Path) -> None:
    """Written by a model that has every token right but the end."""
    document = question(10, 4, answer=[5, 6, EOS_ID])
    for number, (following, right) in enumerate(((FOLLOWING, 1), ({**FOLLOWING, 6: 7}, 0))):
        export = following_export(tmp_path / str(number), following)
        scores = score_answers(ExportModel(export), COUNTDOWN, [document], Sampled((0.0,), 0), unwatched)
        assert scores.numbers["exact_greedy"] == Share(right, 1)
        assert scores.curves["greedy"].shares[:2] == (Share(1, 1), Share(1, 1))


def test_answers_by_position(follower: Path) -> None:
    scores, written = read_and_write(ExportModel(follower), DOCUMENTS, Sampled((0.0,), 0), unwatched)
    assert scores.numbers == {"tokens_teacher_forced": pytest.approx(8 / 12)}
    assert scores.curves["teacher_forced"].shares == (Share(3, 4), Share(2, 4), Share(2, 3), Share(1, 1))
    assert scores.curves["greedy"].shares == (Share(3, 4), Share(3, 4), Share(3, 3), Share(1, 1))
    assert written["greedy"][2].tolist() == [6, EOS_ID]


def test_an_answer_ends_before_its_first_end() -> None:
    assert before_end(np.array([5, 6, EOS_ID])).tolist() == [5, 6]
    assert before_end(np.array([5, 6])).tolist() == [5, 6]
    assert before_end(np.array([EOS_ID])).tolist() == []


def test_a_paths_arm_is_its_second_node(tmp_path: Path) -> None:
    # 4 is the start. The first path has the arm that is written, the second another one, the third its own end.
    export = following_export(tmp_path, {10: 4, **FOLLOWING} | {9: 11})
    paths = [[4, 5, 6, EOS_ID], [4, 7, 6, EOS_ID], [4, 5, 8, EOS_ID]]
    documents = [question(10, answer=path) for path in paths]
    scores = score_path_star(
        ExportModel(export), PathStar(arms=2, length=3, nodes=20), documents, Sampled((0.0,), 0), unwatched
    )
    assert scores.numbers["exact_greedy"] == Share(1, 3)
    assert scores.numbers["arm_greedy"] == Share(2, 3)
    assert scores.numbers["arm_teacher_forced"] == Share(2, 3)
    assert scores.guesses == {"exact_greedy": 0.5, "arm_greedy": 0.5, "arm_teacher_forced": 0.5}


def test_a_path_is_right_whatever_comes_after_it(tmp_path: Path) -> None:
    export = following_export(tmp_path, {10: 4, 4: 5, 5: 6, 6: 8})
    documents = [question(10, answer=[4, 5, 6, EOS_ID]), question(10, answer=[4, 5, 8, EOS_ID])]
    task, sampled = PathStar(arms=2, length=3, nodes=20), Sampled((0.0,), 0)
    assert score_path_star(ExportModel(export), task, documents, sampled, unwatched).numbers["exact_greedy"] == Share(
        1, 2
    )
    assert exact(documents, {"greedy": [np.array([4, 5, 6, 8])] * 2})["exact_greedy"] == Share(0, 2), "of other tasks"


COUNTDOWN = Countdown(inputs=2, pauses=1)


def sum_of(first: int, second: int, target: int, solution: str) -> Document:
    """A problem of two numbers, and its solution."""
    symbols = COUNTDOWN.symbols
    prompt = [FIRST_SYMBOL_ID + symbols.index(word) for word in f"{first} , {second} , {target} |".split()]
    answer = [FIRST_SYMBOL_ID + symbols.index(word) for word in solution.split()]
    return question(*prompt, answer=[*answer, EOS_ID])


def test_countdown_is_judged_by_its_rules(tmp_path: Path) -> None:
    documents = [
        sum_of(4, 3, 7, "4 + 3 = 7"),  # solved, in another way
        sum_of(3, 4, 12, "3 * 4 = 12"),  # valid
        sum_of(4, 5, 9, "4 + 5 = 9"),  # not valid
    ]
    written = [documents[0].tokens[6], *sum_of(3, 4, 7, "3 + 4 = 7").tokens[7:].tolist()]
    export = following_export(
        tmp_path, dict(itertools.pairwise(written)), vocab_size=FIRST_SYMBOL_ID + len(COUNTDOWN.symbols)
    )
    scores = score_countdown(ExportModel(export), COUNTDOWN, documents, Sampled((0.0, 0.01), 0), unwatched)
    for name in ("greedy", "t0.01"):
        assert scores.numbers[f"solved_{name}"] == Share(1, 3)
        assert scores.numbers[f"valid_{name}"] == Share(2, 3)
        assert scores.numbers[f"solved_of_valid_{name}"] == Share(1, 2)
        assert scores.curves[f"equations_{name}"].shares == (Share(2, 3),)


def test_verdicts_are_counted_by_equation() -> None:
    verdicts = [
        CountdownVerdict((True, True, True), True),
        CountdownVerdict((True, True, True), False),  # another number than the target
        CountdownVerdict((True, False, True), False),
        CountdownVerdict((False,), False),  # two are missing
        CountdownVerdict((True, True, True, False), False),  # one too many
    ]
    scores = Scores()
    add_verdicts(scores, "greedy", verdicts, 3)
    assert scores.numbers == {
        "solved_greedy": Share(1, 5),
        "valid_greedy": Share(2, 5),
        "solved_of_valid_greedy": Share(1, 2),
    }
    assert scores.curves["equations_greedy"].shares == (Share(4, 5), Share(3, 5), Share(4, 5))


def test_the_whole_document_fits_where_the_context_is_that_of_training(tmp_path: Path) -> None:
    document = question(10, 4, answer=[5, 6, EOS_ID])
    export = following_export(tmp_path, FOLLOWING, max_position_embeddings=len(document.tokens) - 1)
    scores, _ = read_and_write(ExportModel(export), [document], Sampled((0.0,), 0), unwatched)
    assert scores.curves["greedy"].shares == (Share(1, 1),) * 3


def test_samples_are_the_same_however_they_are_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    decoder = ExportModel(write_export(tmp_path, config, random_weights(config), None)).decoder(0)
    documents = [question(10, 4, answer=[5] * 8)] * 7
    together = [row.tolist() for row in write_answers(decoder, documents, 1.0, 5, unwatched)]
    monkeypatch.setattr(task_answers, "ROWS", 3)
    assert [row.tolist() for row in write_answers(decoder, documents, 1.0, 5, unwatched)] == together
    assert [row.tolist() for row in write_answers(decoder, documents, 1.0, 6, unwatched)] != together
    assert len({tuple(row) for row in together}) > 4


def test_teacher_forcing_is_the_same_however_it_is_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    export = write_export(tmp_path, config, random_weights(config), None)
    rng = np.random.default_rng(0)
    questions = [question(10, *rng.integers(3, 31, n), answer=rng.integers(3, 31, n + 2).tolist()) for n in range(9)]
    decoder: Decoder = ExportModel(export).decoder(0)
    answers = write_answers(decoder, questions, 0.0, 0, unwatched)
    documents = [
        question(*own.tokens[1 : own.prompt_tokens], answer=answer.tolist())
        for own, answer in zip(questions, answers, strict=True)
    ]
    monkeypatch.setattr(task_answers, "ROWS", 4)
    # What the model writes by itself it also says when forced along it.
    assert all(row.all() for row in teacher_forced(ExportModel(export), documents, unwatched))
