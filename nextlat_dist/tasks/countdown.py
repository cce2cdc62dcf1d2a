"""Countdown: reach a target from some numbers with + - * /, every number used once.

    BOS 14 , 83 , 88 , 91 , 23 | | | | | | | | 83 - 14 = 69 , 91 - 88 = 3 , 69 / 3 = 23 EOS

Every whole number from 1 to 10000 is one token, no result leaves that range, and the pauses `|` before the solution
give room to think. Only the solution and EOS are predicted. Source: Gandhi et al. 2024 (arXiv 2404.03683), as
Next-Latent Prediction uses it (arXiv 2511.05963).

Problems are made from their solutions: the inputs are drawn evenly from 1 .. `largest`; each equation takes two of the
numbers that are left at random and one of the operations that they allow (differences above 0, quotients without
remainder), each as likely; what ends at a target of the split is kept. So every problem has a solution, and targets
that many solutions end at are more frequent.

Invariant: a target belongs to one split, decided by `target_seed` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.base import require_at_least
from nextlat_dist.tasks.documents import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, Document, Split, id_array

LARGEST_NUMBER = 10_000
SIGNS = ("+", "-", "*", "/", "=", ",", "|")
EQUATION_WORDS = 5
LARGEST_SEARCH = 100_000  # drawn solutions that all end elsewhere

Equation = tuple[int, str, int, int]


@dataclass(frozen=True)
class Countdown:
    """Problems of `inputs` numbers, with the targets of each split."""

    inputs: int = field(default=4, metadata={"help": "numbers that a problem gives"})
    largest: int = field(default=100, metadata={"help": "the numbers given are from 1 to this"})
    target_from: int = field(default=10, metadata={"help": "smallest target"})
    target_to: int = field(default=100, metadata={"help": "largest target"})
    test_share: float = field(default=0.1, metadata={"help": "share of the targets kept for the test"})
    target_seed: int = field(default=0, metadata={"help": "draws the targets of the test"})
    pauses: int = field(default=8, metadata={"help": "tokens '|' between problem and solution"})

    name = "countdown"

    def __post_init__(self) -> None:
        require_at_least(
            self.name,
            inputs=(self.inputs, 2),
            largest=(self.largest, 1),
            target_from=(self.target_from, 1),
            target_to=(self.target_to, self.target_from),
            target_seed=(self.target_seed, 0),
            pauses=(self.pauses, 1),
        )
        for option in ("largest", "target_to"):
            if getattr(self, option) > LARGEST_NUMBER:
                raise UserError(
                    f"countdown with --{option.replace('_', '-')} {getattr(self, option)} is no task; its numbers are "
                    f"at most {LARGEST_NUMBER}"
                )
        if not 0 < self.test_share < 1 or not all(map(len, self.targets.values())):
            raise UserError(
                f"--test-share {self.test_share} of the {self.target_to - self.target_from + 1} targets leaves a split "
                "without targets; change --test-share, --target-from or --target-to"
            )

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (*map(str, range(1, LARGEST_NUMBER + 1)), *SIGNS)

    @cached_property
    def targets(self) -> dict[str, frozenset[int]]:
        """The targets of each split."""
        targets = np.arange(self.target_from, self.target_to + 1)
        drawn = np.random.default_rng(self.target_seed).permutation(targets).tolist()
        tests = round(self.test_share * len(drawn))
        return {"test": frozenset(drawn[:tests]), "train": frozenset(drawn[tests:])}

    def problem(self, tokens: Sequence[int] | np.ndarray) -> tuple[list[int], int]:
        """The inputs and the target of a document or prompt."""
        *inputs, target = (int(token) - FIRST_SYMBOL_ID + 1 for token in tokens[1 : 2 * self.inputs + 2 : 2])
        return inputs, target

    def sample(self, rng: np.random.Generator, split: Split) -> Document:
        """Raises UserError when no drawn solution ends at a target of the split."""
        for _ in range(LARGEST_SEARCH):
            inputs, equations = _solution(rng.random(4 * self.inputs - 3).tolist(), self.inputs, self.largest)
            target = equations[-1][-1]
            if target in self.targets[split]:
                break
        else:
            raise UserError(
                f"{LARGEST_SEARCH} solutions of {self.inputs} numbers up to {self.largest} all end outside the "
                f"{len(self.targets[split])} {split} targets from {self.target_from} to {self.target_to}; raise "
                "--largest, --inputs or the range of targets"
            )
        prompt = [BOS_ID, *_ids(_joined([[str(number)] for number in (*inputs, target)]) + ["|"] * self.pauses)]
        steps = [[str(left), sign, str(right), "=", str(result)] for left, sign, right, result in equations]
        content = np.array([*sorted(inputs), target], dtype="<i8").tobytes()
        return Document(id_array(prompt, _ids(_joined(steps)), [EOS_ID]), len(prompt), content)


@dataclass(frozen=True)
class CountdownVerdict:
    """What an answer is worth.

    Attributes:
        equations: for each equation of the answer whether it is one, its numbers are left and it is right. A wrong
            result is taken as given by the later ones, so that one mistake counts once.
        solved: all are valid, every number is used, and the last result is the target.
    """

    equations: tuple[bool, ...]
    solved: bool


def judge(inputs: Sequence[int], target: int, answer: Sequence[str]) -> CountdownVerdict:
    """Judge the words of an answer, those before EOS: `["83", "-", "14", "=", "69", ",", …]`."""
    left = Counter(inputs)
    valid: list[bool] = []
    result = None
    for words in _split_at_commas(answer):
        equation = _equation(words)
        if equation is None:
            valid.append(False)
            continue
        first, sign, second, result = equation
        used = Counter((first, second))
        valid.append(used <= left and (first, sign, second, result) in _operations(first, second))
        left = left - used + Counter([result])
    return CountdownVerdict(tuple(valid), all(valid) and result == target and left.total() == 1)


def _split_at_commas(words: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        if word == ",":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _equation(words: Sequence[str]) -> Equation | None:
    if len(words) != EQUATION_WORDS or words[3] != "=" or words[1] not in SIGNS[:4]:
        return None
    if not all(words[place].isdecimal() for place in (0, 2, 4)):
        return None
    return int(words[0]), words[1], int(words[2]), int(words[4])


def _operations(a: int, b: int) -> list[Equation]:
    """The equations that begin with a, then b, and stay within 1 .. `LARGEST_NUMBER`."""
    found: list[Equation] = [(a, "+", b, a + b), (a, "-", b, a - b), (a, "*", b, a * b)]
    if b and not a % b:
        found.append((a, "/", b, a // b))
    return [equation for equation in found if 1 <= equation[-1] <= LARGEST_NUMBER]


def _solution(uniforms: Sequence[float], inputs: int, largest: int) -> tuple[list[int], list[Equation]]:
    """Numbers and a solution made of them, of 4 · inputs - 3 even draws from [0, 1)."""
    numbers = [1 + int(uniform * largest) for uniform in uniforms[:inputs]]
    left = list(numbers)
    equations: list[Equation] = []
    draws = iter(uniforms[inputs:])
    while len(left) > 1:
        a, b = (left.pop(int(next(draws) * len(left))) for _ in range(2))
        possible = {equation[1]: equation for equation in _operations(b, a) + _operations(a, b)}
        equation = list(possible.values())[int(next(draws) * len(possible))]
        equations.append(equation)
        left.append(equation[-1])
    return numbers, equations


def _joined(parts: Sequence[Sequence[str]]) -> list[str]:
    """The parts with commas between them."""
    return [word for number, part in enumerate(parts) for word in ([","] if number else []) + list(part)]


def _ids(words: Sequence[str]) -> list[int]:
    after_numbers = FIRST_SYMBOL_ID + LARGEST_NUMBER
    return [after_numbers + SIGNS.index(word) if word in SIGNS else FIRST_SYMBOL_ID - 1 + int(word) for word in words]
