"""Speculative sampling, exactly: every branch of a cycle is enumerated, the joint distribution is the base's.

The verifier is a black box: an outcome is a step function of each uniform number, and its steps are found by bisection.
How far a row drafts is up to a pace, the engine's own or one that does its worst with what it may know. Wrong
verifiers, and a pace that looks at the token it has drawn, go through the same harness and must be noticed.

Command: `pytest tests/inference/speculative/test_verify.py`.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.policy import AdaptivePolicy, Pace
from nextlat_dist.inference.speculative.verify import Drafts, DraftStep, residual, verify_greedy, verify_sampled
from tests.kit.exports import calibration
from tests.kit.verifiers import WRONG_VERIFIERS, Outcome, Verifier

Distribution = dict[tuple[int, ...], float]
TOP = math.nextafter(1.0, 0.0)
EXACT = 1e-12


@dataclass(frozen=True)
class Tables:
    """A base and a draft distribution for every prefix of up to `drafts` tokens; only `ids` may be drafted."""

    vocabulary: int
    drafts: int
    base: dict[tuple[int, ...], torch.Tensor]
    draft: dict[tuple[int, ...], torch.Tensor]  # [len(ids)]
    ids: list[int] | None = None

    @staticmethod
    def random(sampling: Sampling, vocabulary: int, drafts: int, ids: list[int] | None = None, seed: int = 5) -> Tables:
        generator = torch.Generator().manual_seed(seed)

        def logits(size: int) -> torch.Tensor:
            return 1.5 * torch.randn(size, generator=generator, dtype=torch.float64)

        prefixes = [p for n in range(drafts + 1) for p in itertools.product(range(vocabulary), repeat=n)]
        base = {prefix: sampling.probabilities(logits(vocabulary)) for prefix in prefixes}
        draft = {prefix: sampling.probabilities(logits(len(ids) if ids else vocabulary)) for prefix in prefixes}
        return Tables(vocabulary, drafts, base, draft, ids)

    def continuation(self, prefix: tuple[int, ...], tokens: tuple[int, ...]) -> float:
        """P(the base emits `tokens` after `prefix`)."""
        whole = prefix + tokens
        return math.prod(float(self.base[whole[:i]][whole[i]]) for i in range(len(prefix), len(whole)))

    def joint(self) -> Distribution:
        every = itertools.product(range(self.vocabulary), repeat=self.drafts + 1)
        return {tokens: self.continuation((), tokens) for tokens in every}


@dataclass
class Rule:
    """A pace that decides by `stop(tokens drafted so far, confidence)`, which nothing says is wise."""

    stop: Callable[[int, float], bool]
    drafted: int = 0

    def begins(self) -> bool:
        return True

    def takes(self, confidence: float) -> bool:
        self.drafted += 1
        return not self.stop(self.drafted - 1, confidence)

    def continues(self) -> bool:
        return True

    def settle(self, accepted: int) -> None:
        pass


def never(drafted: int, confidence: float) -> bool:
    return False


def adaptive(records: Sequence[int] = (), draft_cost: float = 0.05) -> Pace:
    """The engine's own pace, after cycles that accepted as many drafts as `records` says."""
    pace = AdaptivePolicy(calibration(draft_cost), 1.0, 1, None).pace()
    for accepted in records:
        drafted = 0
        going = pace.begins()
        while going and drafted < 4:
            if not pace.takes(0.6):
                break
            drafted += 1
            going = pace.continues()
        pace.settle(min(accepted, drafted))
    return pace


@dataclass(frozen=True)
class Drafted:
    tokens: tuple[int, ...]
    probability: float


def all_drafts(
    tables: Tables, pace: Pace, keeps: Callable[[float], bool], tokens: tuple[int, ...] = (), probability: float = 1.0
) -> Iterator[Drafted]:
    """Everything that may be drafted, as the engine drafts; `keeps` may discard a token for its own probability."""
    if len(tokens) < tables.drafts and (pace.continues() if tokens else pace.begins()):
        q = tables.draft[tokens]
        if pace.takes(float(q.max())):
            for column, share in enumerate(q.tolist()):
                token = tables.ids[column] if tables.ids else column
                if share > 0 and keeps(share):
                    yield from all_drafts(tables, copy.deepcopy(pace), keeps, (*tokens, token), probability * share)
                elif share > 0:
                    yield Drafted(tokens, probability * share)
            return
    yield Drafted(tokens, probability)


def verify_all(tables: Tables, verifier: Verifier, probes: Sequence[tuple[Drafted, list[float]]]) -> Outcome:
    """One call of the verifier, with every probe as a row."""
    drafts = Drafts(len(probes), torch.tensor(tables.ids) if tables.ids else None)
    for position in range(tables.drafts):
        rows = [row for row, (drafted, _) in enumerate(probes) if len(drafted.tokens) > position]
        if rows:
            tokens = [probes[row][0].tokens[position] for row in rows]
            q = torch.stack([tables.draft[probes[row][0].tokens[:position]] for row in rows])
            columns = [tables.ids.index(token) if tables.ids else token for token in tokens]
            drafts.steps.append(DraftStep(rows, tokens, q, q[range(len(rows)), columns].tolist()))
    p = [tables.base[drafted.tokens[:i]] for drafted, _ in probes for i in range(len(drafted.tokens) + 1)]
    return verifier(torch.stack(p), drafts, [uniforms for _, uniforms in probes])


def step_lengths(outcomes: Callable[[list[tuple[int, float]]], list[int]], functions: int) -> list[dict[int, float]]:
    """For each of several step functions on [0, 1), the length on which it takes each value.

    All are bisected at once, wherever the ends of an interval differ: their values must not come back.
    """
    lengths: list[dict[int, float]] = [defaultdict(float) for _ in range(functions)]
    if functions == 0:
        return []
    ends = outcomes([(index, end) for index in range(functions) for end in (0.0, TOP)])
    intervals = [(index, 0.0, TOP, ends[2 * index], ends[2 * index + 1]) for index in range(functions)]
    while intervals:
        wide: list[tuple[int, float, float, int, int]] = []
        for index, low, high, first, last in intervals:
            if first == last:
                lengths[index][first] += high - low
            elif high - low > 1e-15:
                wide.append((index, low, high, first, last))
        middles = outcomes([(index, (low + high) / 2) for index, low, high, *_ in wide]) if wide else []
        intervals = [
            part
            for (index, low, high, first, last), value in zip(wide, middles, strict=True)
            for middle in [(low + high) / 2]
            for part in ((index, low, middle, first, value), (index, middle, high, value, last))
        ]
    return lengths


def distribution_of_a_cycle(
    tables: Tables, verifier: Verifier, pace: Pace, keeps: Callable[[float], bool]
) -> Distribution:
    """Joint distribution of the first `drafts` + 1 tokens: one cycle, and the base model for what it leaves open."""
    leaves = list(all_drafts(tables, pace, keeps))
    assert sum(leaf.probability for leaf in leaves) == pytest.approx(1, abs=EXACT)

    def kept(probes: list[tuple[int, float]]) -> list[int]:
        rows = [(places[index], uniform) for index, uniform in probes]
        numbers = [
            (leaf, [0.0] * position + [uniform] + [TOP] * (len(leaf.tokens) - position))
            for (leaf, position), uniform in rows
        ]
        accepted, _ = verify_all(tables, verifier, numbers)
        return [int(count > position) for count, ((_, position), _) in zip(accepted, rows, strict=True)]

    places = [(leaf, position) for leaf in leaves for position in range(len(leaf.tokens))]
    acceptance = {place: line.get(1, 0.0) for place, line in zip(places, step_lengths(kept, len(places)), strict=True)}
    branches: list[tuple[Drafted, int, float]] = []
    for leaf in leaves:
        reached = leaf.probability
        for accepted in range(len(leaf.tokens) + 1):
            share = acceptance[leaf, accepted] if accepted < len(leaf.tokens) else 0.0
            if reached * (1 - share) > 1e-15:
                branches.append((leaf, accepted, reached * (1 - share)))
            reached *= share

    def following(probes: list[tuple[int, float]]) -> list[int]:
        rows = [(*branches[index][:2], uniform) for index, uniform in probes]
        numbers = [(leaf, [0.0] * n + [TOP] * (len(leaf.tokens) - n) + [uniform]) for leaf, n, uniform in rows]
        accepted, tokens = verify_all(tables, verifier, numbers)
        assert accepted == [n for _, n, _ in rows]
        return tokens

    distribution: Distribution = defaultdict(float)
    for (leaf, accepted, probability), line in zip(branches, step_lengths(following, len(branches)), strict=True):
        for token, share in line.items():
            emitted = (*leaf.tokens[:accepted], token)
            for rest in itertools.product(range(tables.vocabulary), repeat=tables.drafts - accepted):
                distribution[emitted + rest] += probability * share * tables.continuation(emitted, rest)
    return distribution


def largest_error(
    tables: Tables,
    verifier: Verifier = verify_sampled,
    pace: Pace | None = None,
    keeps: Callable[[float], bool] = lambda share: True,
) -> float:
    distribution = distribution_of_a_cycle(tables, verifier, pace or Rule(never), keeps)
    joint = tables.joint()
    assert set(distribution) <= set(joint)
    return max(abs(distribution.get(tokens, 0.0) - probability) for tokens, probability in joint.items())


SAMPLINGS = [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.7), Sampling(2.0, 3, 0.9)]
REDUCED = [2, 0]


@pytest.mark.parametrize("ids", [None, REDUCED], ids=["whole", "reduced"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_joint_distribution_is_the_base_models(sampling: Sampling, ids: list[int] | None) -> None:
    assert largest_error(Tables.random(sampling, 3, 2, ids)) < EXACT


@pytest.mark.parametrize(
    ("vocabulary", "drafts", "ids"), [(8, 1, None), (8, 2, [6, 1, 4]), (5, 2, None), (2, 3, None), (3, 3, [1, 2])]
)
def test_more_tokens_and_more_drafts(vocabulary: int, drafts: int, ids: list[int] | None) -> None:
    assert largest_error(Tables.random(Sampling(0.8, top_p=0.95), vocabulary, drafts, ids)) < EXACT


PACES: dict[str, Callable[[], Pace]] = {
    "where it is confident": lambda: Rule(lambda drafted, confidence: confidence > 0.6),
    "where it is not confident": lambda: Rule(lambda drafted, confidence: confidence < 0.6),
    "on a confident second step": lambda: Rule(lambda drafted, confidence: drafted == 1 and confidence > 0.55),
    "by a digit of the confidence": lambda: Rule(lambda drafted, confidence: int(confidence * 1e6) % 2 == 0),
    "adaptive": lambda: adaptive(draft_cost=0.2),
    "adaptive after success": lambda: adaptive([4] * 12, draft_cost=0.45),
    "adaptive after failure": lambda: adaptive([0, 0, 1, 0]),
}


@pytest.mark.parametrize("ids", [None, REDUCED], ids=["whole", "reduced"])
@pytest.mark.parametrize("pace", PACES)
def test_stopping_by_what_is_known_before_a_token_is_drawn(pace: str, ids: list[int] | None) -> None:
    for seed in range(3):
        tables = Tables.random(Sampling(0.7), 3, 3, ids, seed)
        assert largest_error(tables, pace=PACES[pace]()) < EXACT


def test_paces_stop_at_several_lengths() -> None:
    """Or the test above would say little."""
    for name, pace in PACES.items():
        lengths = {
            len(leaf.tokens)
            for seed in range(3)
            for leaf in all_drafts(Tables.random(Sampling(0.7), 3, 3, None, seed), pace(), lambda share: True)
        }
        assert len(lengths) > 1, name


def test_a_token_discarded_for_its_own_value_is_noticed() -> None:
    """p = q = (.5, .3, .2), and tokens drafted with less than .4 thrown away: what comes out is (.75, .15, .10)."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    prefixes: list[tuple[int, ...]] = [(), (0,), (1,), (2,)]
    tables = Tables(3, 1, dict.fromkeys(prefixes, p), dict.fromkeys(prefixes, p))
    distribution = distribution_of_a_cycle(tables, verify_sampled, Rule(never), lambda share: share >= 0.4)
    first = [sum(distribution[a, b] for b in range(3)) for a in range(3)]
    assert first == pytest.approx([0.75, 0.15, 0.10], abs=EXACT)
    # The same threshold on the confidence, which is known before, is right.
    assert largest_error(tables, pace=Rule(lambda drafted, confidence: confidence < 0.4)) < EXACT


@pytest.mark.parametrize("wrong", WRONG_VERIFIERS)
def test_the_harness_notices_a_wrong_verifier(wrong: Verifier) -> None:
    assert largest_error(Tables.random(Sampling(1.0), 3, 2), wrong) > 1e-2


def one_row(drafted: Sequence[int], q: torch.Tensor, vocabulary: torch.Tensor | None = None) -> Drafts:
    steps = [DraftStep([0], [token], q[i : i + 1], [float(q[i, token])]) for i, token in enumerate(drafted)]
    return Drafts(1, vocabulary, steps)


def test_identical_distributions_accept_everything() -> None:
    p = torch.rand(4, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert verify_sampled(p, one_row([1, 2, 3], p), [[TOP] * 4])[0] == [3]
    torch.testing.assert_close(residual(p, p.clone()), p)


def test_without_drafts_the_next_token_is_drawn_from_the_base() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25]] * 3)
    assert verify_sampled(p, Drafts(3), [[0.4], [0.6], [0.9]]) == ([0, 0, 0], [0, 1, 2])


def test_rows_of_several_lengths_are_told_apart() -> None:
    """Each row alone, and all in one call, in any order."""
    tables = Tables.random(Sampling(1.0), 3, 2)
    generator = torch.Generator().manual_seed(1)
    probes = []
    for tokens in [(), (0,), (2, 1), (1,), (), (1, 1), (0, 2), (2,)]:
        probes.append((Drafted(tokens, 1.0), torch.rand(len(tokens) + 1, generator=generator).tolist()))
    alone = [verify_all(tables, verify_sampled, [probe]) for probe in probes]
    for order in ([0, 1, 2, 3, 4, 5, 6, 7], [7, 2, 0, 5, 4, 1, 3, 6]):
        accepted, following = verify_all(tables, verify_sampled, [probes[i] for i in order])
        assert [([a], [f]) for a, f in zip(accepted, following, strict=True)] == [alone[i] for i in order]


def test_greedy() -> None:
    drafts = Drafts(4, None, [DraftStep([0, 1, 2], [5, 5, 4]), DraftStep([0, 1], [6, 1]), DraftStep([0, 1], [7, 7])])
    choices = [5, 6, 7, 8, *[5, 6, 7, 8], *[5, 6], 5]
    assert verify_greedy(choices, drafts) == ([3, 1, 0, 0], [8, 6, 5, 5])
