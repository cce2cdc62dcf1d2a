from __future__ import annotations

import itertools

import numpy as np
import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.tasks import BOS_ID, EOS_ID, words_of
from nextlat_dist.tasks.state_tracking import StateTracking


def test_labels_are_products_one_place_on_worked_out_by_hand() -> None:
    task = StateTracking(length=4, group="S3")
    number = {name: index for index, name in enumerate(task.symbols)}
    elements = np.array([number[name] for name in ("(0,1)", "(1,2)", "(1,2)", "(0,1,2)")])
    products = [task.symbols[product] for product in task.products(elements)]
    # (0,1), then (1,2): (0,2,1), as in the test of groups; (1,2) again takes that back; then 0→1→2, 1→0→1, 2→0.
    assert products == ["(0,1)", "(0,2,1)", "(0,1)", "(0,2)"]


def test_a_document_holds_its_elements_and_their_products() -> None:
    task, rng = StateTracking(length=7, group="Z5"), np.random.default_rng(0)
    document = task.sample(rng, "train")
    words = words_of(task, document.tokens)
    assert (document.tokens[0], document.tokens[-1], len(words)) == (BOS_ID, EOS_ID, 9)
    assert document.prompt_tokens == 2
    assert document.labels is not None
    assert document.labels.shape == document.tokens.shape
    sums = [str(total % 5) for total in itertools.accumulate(map(int, words[1:-1]))]
    assert words_of(task, document.labels[2:]) == sums  # the state that has read x_i predicts labels[i + 1]


def test_elements_are_drawn_evenly() -> None:
    task, rng = StateTracking(length=50, group="A4"), np.random.default_rng(0)
    drawn = np.concatenate([task.sample(rng, "train").tokens[1:-1] for _ in range(240)])
    counts = np.bincount(drawn - 4, minlength=12)
    assert counts.sum() == 12000
    assert abs(counts - 1000).max() < 5 * 31


def test_test_documents_may_be_longer_and_are_compared_by_their_beginnings() -> None:
    task, rng = StateTracking(length=4, group="S3", test_length=(6, 9)), np.random.default_rng(0)
    lengths = {split: {len(task.sample(rng, split).tokens) - 2 for _ in range(40)} for split in ("train", "test")}  # type: ignore[arg-type]
    assert lengths == {"train": {4}, "test": {6, 9}}
    document = task.sample(rng, "test")
    assert document.content == (document.tokens[1:5] - 4).astype("<i8").tobytes()
    assert {len(StateTracking(length=4, group="S3").sample(rng, "test").tokens)} == {6}


def test_any_group_by_generators_comes_back_from_its_parameters() -> None:
    task = StateTracking(length=3, generators=("(0 1 2)(3 4)",), test_length=(5,))
    assert len(task.symbols) == 6
    assert task.parameters == {
        "length": 3,
        "group": None,
        "generators": ["(0 1 2)(3 4)"],
        "test_length": [5],
    }


def test_what_is_no_task() -> None:
    with pytest.raises(UserError, match="--length 1 is no task; it must be at least 2"):
        StateTracking(length=1, group="S3")
    with pytest.raises(UserError, match="give --group or --generators, one of them"):
        StateTracking(length=3)
    with pytest.raises(UserError, match="give --group or --generators, one of them"):
        StateTracking(length=3, group="S3", generators=("(0 1)",))
    with pytest.raises(UserError, match="--test-length 3 is shorter than --length 4"):
        StateTracking(length=4, group="S3", test_length=(6, 3))
    with pytest.raises(UserError, match="one element only"):
        StateTracking(length=4, generators=("()",))
