from __future__ import annotations

import re

import numpy as np
import pytest

from nextlat_dist.errors import UserError
from nextlat_dist.tasks import BOS_ID, EOS_ID, words_of
from nextlat_dist.tasks.countdown import Countdown, CountdownVerdict, judge


def _words(answer: str) -> list[str]:
    return re.findall(r"\d+|[^\d\s]", answer)


JUDGED = {  # of 14, 83, 88, 91 for 23
    "83-14=69,91-88=3,69/3=23": ((True, True, True), True),
    "91-88=3,83-14=69,69/3=23": ((True, True, True), True),
    "83-14=69,91-88=3,69-3=66": ((True, True, True), False),  # right, but not the target
    "83-14=69,91-88=3": ((True, True), False),  # two numbers are left
    "14+9=23": ((False,), False),  # 9 is not given
    "83-14=68,91-88=3,68-3=65": ((False, True, True), False),  # one mistake counts once
    "83-14=70,91-88=3,69/3=23": ((False, True, False), False),  # 69 was not the result that was stated
    "83-14=69,83-14=69,69/69=1": ((True, False, True), False),  # 83 and 14 are used up
    "91-88=3,83-14=69,69/3=24": ((True, True, False), False),
    "14-83=69,91-88=3,69/3=23": ((False, True, True), False),  # a difference below 0
    "83/14=5,91-88=3,5*3=15": ((False, True, True), False),  # a quotient with a remainder
    "83-14=69,91-88=3,69/3=23,": ((True, True, True, False), False),
    "83-14=69,,69/3=23": ((True, False, False), False),
    "83-14,91-88=3": ((False, True), False),
    "83 14=69": ((False,), False),
    "83-14=69=69": ((False,), False),
    "=": ((False,), False),
    "": ((False,), False),
}


@pytest.mark.parametrize("answer", JUDGED)
def test_answers_judged_by_hand(answer: str) -> None:
    assert judge([14, 83, 88, 91], 23, _words(answer)) == CountdownVerdict(*JUDGED[answer])


def test_numbers_given_twice_can_be_used_twice_and_no_more() -> None:
    assert judge([5, 5], 25, _words("5*5=25")) == CountdownVerdict((True,), True)
    assert judge([20, 3, 7], 23, _words("20+3=23")) == CountdownVerdict((True,), False)  # 7 is not used
    assert judge([5, 6], 25, _words("5*5=25")) == CountdownVerdict((False,), False)
    assert judge([5, 5], 1, _words("5/5=1")).solved
    assert not judge([5, 5], 0, _words("5-5=0")).equations[0]  # results are at least 1
    assert judge([100, 100], 10000, _words("100*100=10000")).solved
    assert not judge([101, 100], 10100, _words("101*100=10100")).equations[0]  # and at most 10000


@pytest.mark.parametrize("inputs", [2, 4, 6])
def test_every_problem_comes_with_a_solution(inputs: int) -> None:
    task, rng = Countdown(inputs=inputs), np.random.default_rng(0)
    for _ in range(60):
        document = task.sample(rng, "train")
        words = words_of(task, document.tokens)
        numbers, target = task.problem(document.tokens)
        problem, answer = words[: document.prompt_tokens], words[document.prompt_tokens :]
        assert problem == ["<s>", *",".join(map(str, [*numbers, target])).replace(",", " , ").split(), *["|"] * 8]
        assert len(numbers) == inputs
        assert 1 <= min(numbers) <= max(numbers) <= 100
        assert target in task.targets["train"]
        assert answer.pop() == "</s>"
        assert judge(numbers, target, answer) == CountdownVerdict((True,) * (inputs - 1), True)
        assert document.content == np.array([*sorted(numbers), target], dtype="<i8").tobytes()
        assert (document.tokens[0], document.tokens[-1]) == (BOS_ID, EOS_ID)


def test_a_tenth_of_the_targets_is_kept_for_the_test() -> None:
    task, rng = Countdown(), np.random.default_rng(0)
    assert (len(task.targets["test"]), len(task.targets["train"])) == (9, 82)
    assert task.targets["test"] | task.targets["train"] == set(range(10, 101))
    assert Countdown().targets == task.targets != Countdown(target_seed=1).targets
    drawn = {task.problem(task.sample(rng, "test").tokens)[1] for _ in range(100)}
    assert drawn <= task.targets["test"]
    assert len(drawn) > 5


def test_all_four_operations_are_drawn_and_every_number_is_one_token() -> None:
    task, rng = Countdown(), np.random.default_rng(0)
    signs = [word for _ in range(200) for word in words_of(task, task.sample(rng, "train").tokens) if word in "+-*/"]
    assert set(signs) == set("+-*/")
    assert len(task.symbols) == 10_007
    assert len(task.sample(rng, "train").tokens) == 36


def test_the_numbers_given_go_from_1_to_the_largest() -> None:
    task, rng = Countdown(inputs=2, largest=4, target_from=1, target_to=16), np.random.default_rng(0)
    drawn = [task.problem(task.sample(rng, "train").tokens)[0] for _ in range(100)]
    assert set(np.ravel(drawn).tolist()) == {1, 2, 3, 4}


def test_what_is_no_task() -> None:
    for option, value in {"inputs": 1, "largest": 0, "target_from": 0, "target_to": 9, "pauses": 0}.items():
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value} is no task; it must be at least"):
            Countdown(**{option: value})
    with pytest.raises(UserError, match="--target-to 10001 is no task; its numbers are at most 10000"):
        Countdown(target_to=10001)
    for share in (0.0, 0.001, 0.999, 1.0):
        with pytest.raises(UserError, match=f"--test-share {share} of the 91 targets leaves a split without"):
            Countdown(test_share=share)
    impossible = Countdown(inputs=2, largest=2, target_from=50, target_to=60)
    with pytest.raises(UserError, match="100000 solutions of 2 numbers up to 2 all end outside the 1 test targets"):
        impossible.sample(np.random.default_rng(0), "test")
