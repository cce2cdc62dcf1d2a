"""State tracking on words of Z3 with a model whose every answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.tasks.scorers import state_tracking
from nextlat_dist.evaluation.tasks.scorers.state_tracking import score_tracking
from nextlat_dist.evaluation.tasks.scores import Scores, Share
from nextlat_dist.tasks import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, Document
from nextlat_dist.tasks.state_tracking import StateTracking

TASK = StateTracking(length=3, group="Z3")


class Counter:
    """Counts modulo 3 in a state that is one-hot; the transformer stops counting after `reach` elements, the predictor
    takes the element 0 for `zero`.
    """

    vocab_size, hidden_size = FIRST_SYMBOL_ID + 3, 3

    def __init__(self, reach: int = 100, zero: int = 0, has_predictor: bool = True) -> None:
        self.reach, self.zero, self.has_predictor = reach, zero, has_predictor

    def states(self, tokens: Tensor) -> Tensor:
        elements = (tokens - FIRST_SYMBOL_ID).clamp(min=0)
        elements[:, self.reach + 1 :] = 0
        return one_hot(elements.cumsum(dim=1) % 3, 3).float()

    def logits(self, states: Tensor) -> Tensor:
        return torch.cat([torch.zeros(*states.shape[:-1], FIRST_SYMBOL_ID), states], dim=-1)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        elements = tokens - FIRST_SYMBOL_ID
        elements = torch.where(elements == 0, self.zero, elements)
        return one_hot((states.argmax(dim=-1) + elements) % 3, 3).float()


def word(*elements: int) -> Document:
    sums = np.cumsum(elements) % 3
    return Document(
        tokens=np.array([BOS_ID, *(FIRST_SYMBOL_ID + x for x in elements), EOS_ID]),
        prompt_tokens=2,
        content=b"",
        labels=np.array([BOS_ID, FIRST_SYMBOL_ID + elements[0], *(FIRST_SYMBOL_ID + s for s in sums)]),
    )


def accuracies(scores: Scores, name: str) -> list[float]:
    assert scores.curves[name].first == 1
    return [share.value for share in scores.curves[name].shares]


# Sums: 1 2 0 1, and 1 2 2 2.
WORDS = [word(1, 1, 1, 1), word(1, 1, 0, 0)]


def test_a_model_that_counts_is_right_at_every_position() -> None:
    scores = score_tracking(Counter(), WORDS, TASK)
    assert accuracies(scores, "transformer") == [1, 1, 1, 1]
    assert accuracies(scores, "latent_rnn") == [1, 1, 1, 1]


def test_the_rnn_is_fed_by_the_first_state_and_the_tokens_alone() -> None:
    # The transformer says 1 2 2 2 to both words.
    scores = score_tracking(Counter(reach=2), WORDS, TASK)
    assert accuracies(scores, "transformer") == [1, 1, 0.5, 0.5]
    assert accuracies(scores, "latent_rnn") == [1, 1, 1, 1]


def test_the_rnn_starts_with_the_state_after_the_first_element() -> None:
    # Nothing counted at all: the transformer says 0 0 0 0, the RNN one less than the sum from then on.
    scores = score_tracking(Counter(reach=0), WORDS, TASK)
    assert accuracies(scores, "transformer") == [0, 0, 0.5, 0]
    assert accuracies(scores, "latent_rnn") == [0, 0, 0, 0]


def test_the_rnns_own_mistakes_stay() -> None:
    # 0 counts as 1: the second word gives 1 2 0 1 where 1 2 2 2 is right.
    scores = score_tracking(Counter(zero=1), WORDS, TASK)
    assert accuracies(scores, "transformer") == [1, 1, 1, 1]
    assert accuracies(scores, "latent_rnn") == [1, 1, 0.5, 0.5]


def test_numbers_at_multiples_of_the_training_length() -> None:
    # Position 3 is the training length and 4 its 4/3; 6 and 9 are beyond these words.
    words = [word(1, 0, 1, 1), word(1, 0, 0, 1), word(1, 0, 2, 0)]
    # Stopped after one element the transformer says 1 1 1 1 where 1 1 2 0, 1 1 1 2 and 1 1 0 0 are right.
    scores = score_tracking(Counter(reach=1), words, TASK)
    assert scores.numbers == {
        "transformer_reach": 2,
        "latent_rnn_reach": 4,
        "transformer_1x": Share(1, 3),
        "transformer_whole_1x": Share(1, 3),
        "latent_rnn_1x": Share(3, 3),
        "latent_rnn_whole_1x": Share(3, 3),
        "transformer_4_3x": Share(0, 3),
        "transformer_whole_4_3x": Share(0, 3),
        "latent_rnn_4_3x": Share(3, 3),
        "latent_rnn_whole_4_3x": Share(3, 3),
    }
    assert scores.guesses["latent_rnn_4_3x"] == pytest.approx(1 / 3)


def test_reach_ends_where_accuracy_first_falls() -> None:
    # 1 1 1 1 is said, the sums are 1 2 1 1: wrong once, right again.
    scores = score_tracking(Counter(reach=1), [word(1, 1, 2, 0)], TASK)
    assert scores.numbers["transformer_reach"] == 1
    assert score_tracking(Counter(reach=0), [word(1, 1, 1)], TASK).numbers["transformer_reach"] == 0


def test_whole_needs_every_position() -> None:
    # 1 1 1 1 against 1 2 0 1: right again at the end by chance.
    scores = score_tracking(Counter(reach=1), [word(1, 1, 1, 1)], TASK)
    assert scores.numbers["transformer_4_3x"] == Share(1, 1)
    assert scores.numbers["transformer_whole_4_3x"] == Share(0, 1)


def test_words_of_several_lengths_count_where_they_reach() -> None:
    words: Sequence[Document] = [word(1, 1, 1), word(1, 1, 1, 1), word(1, 1, 2, 1, 1, 1)]
    # The transformer says 1 2 2 2 2 2; the sums are 1 2 0, 1 2 0 1 and 1 2 1 2 0 1.
    scores = score_tracking(Counter(reach=2), words, TASK)
    assert scores.curves["transformer"].shares == (
        Share(3, 3),
        Share(3, 3),
        Share(0, 3),
        Share(1, 2),
        Share(0, 1),
        Share(0, 1),
    )
    assert scores.numbers["transformer_2x"] == Share(0, 1)
    assert scores.numbers["latent_rnn_whole_2x"] == Share(1, 1)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    words = [word(*rng.integers(3, size=rng.integers(3, 6))) for _ in range(20)]
    together = score_tracking(Counter(reach=2), words, TASK)
    monkeypatch.setattr(state_tracking, "ROWS", 3)
    assert score_tracking(Counter(reach=2), words, TASK) == together


def test_a_model_without_predictor_has_no_rnn() -> None:
    scores = score_tracking(Counter(has_predictor=False), WORDS, TASK)
    assert list(scores.curves) == ["transformer"]


def test_documents_without_labels_are_refused() -> None:
    with pytest.raises(UserError, match="no labels"):
        score_tracking(Counter(), [Document(WORDS[0].tokens, 2, b"")], TASK)
