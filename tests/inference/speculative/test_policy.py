"""Adaptive draft lengths: the arithmetic against hand-made cases, and against the best policy found by brute force."""

from __future__ import annotations

import random

import pytest

from nextlat_dist.inference.speculative.calibration import Acceptance, Calibration, Costs
from nextlat_dist.inference.speculative.policy import LONGEST, AdaptivePolicy


def calibration(draft: float, width: float, accept: float, sharpness: float = 0.0) -> Calibration:
    """One draft step costs `draft`, one more token to verify `width` plain steps; drafts are accepted at rate `accept`
    whatever the confidence, or with `sharpness` 1 exactly as confident.
    """
    costs = Costs({1: draft}, {1: {1: 1.0, 2: 1.0 + width, 3: 1.0 + 2 * width}})
    odds = [0.0, 1.0, 0.0] if sharpness else [_logit(accept), 0.0, 0.0]
    return Calibration("cpu", costs, [Acceptance(0.0, [accept], odds)])


def _logit(p: float) -> float:
    from math import log

    return log(p / (1 - p))


def play(policy: AdaptivePolicy, accept: float, cycles: int, seed: int = 0) -> tuple[float, float]:
    """(tokens per plain step, drafts per cycle) of a row whose drafts are accepted independently with `accept`."""
    numbers, pace = random.Random(seed), policy.pace()
    tokens = time = drafted = 0.0
    for _ in range(cycles):
        drafts = steps = 0
        going = pace.begins()
        while going:
            steps += 1
            if not pace.takes(accept):
                break
            drafts += 1
            going = pace.continues()
        kept = next((i for i in range(drafts) if numbers.random() >= accept), drafts)
        pace.settle(kept)
        tokens += kept + 1
        time += policy.drafting(steps) + policy.verify[drafts]
        drafted += drafts
    return tokens / time, drafted / cycles


def fixed_rate(policy: AdaptivePolicy, accept: float, drafts: int) -> float:
    return sum(accept**i for i in range(drafts + 1)) / policy.cost[drafts]


@pytest.mark.parametrize("accept", [0.2, 0.5, 0.7, 0.9, 0.98])
@pytest.mark.parametrize(("draft", "width"), [(0.05, 0.02), (0.1, 0.1), (0.2, 0.3), (0.02, 0.6)])
def test_with_equal_confidence_it_finds_the_best_fixed_length(accept: float, draft: float, width: float) -> None:
    policy = AdaptivePolicy(calibration(draft, width, accept), 0.0, 1, None)
    rate, _ = play(policy, accept, 20_000)
    best = max(fixed_rate(policy, accept, drafts) for drafts in range(LONGEST + 1))
    assert rate > 0.985 * best


@pytest.mark.parametrize("accept", [0.3, 0.9])
def test_a_row_that_fares_otherwise_than_calibrated_is_noticed(accept: float) -> None:
    policy = AdaptivePolicy(calibration(0.1, 0.1, 0.65), 0.0, 1, None)
    rate, _ = play(policy, accept, 20_000)
    assert rate > 0.96 * max(fixed_rate(policy, accept, drafts) for drafts in range(LONGEST + 1))


def test_nothing_is_drafted_where_verification_costs_as_much_as_decoding() -> None:
    policy = AdaptivePolicy(calibration(0.05, 1.0, 0.97), 0.0, 1, None)
    rate, drafts = play(policy, 0.97, 500)
    assert (rate, drafts) == (1.0, 0.0)


def test_confidence_beats_every_fixed_length() -> None:
    """Drafts are nearly certain (0.98) or hopeless (0.1), which shows before they are drawn: the pace stops there."""
    policy = AdaptivePolicy(calibration(0.08, 0.15, 0.7, sharpness=1.0), 0.0, 1, None)
    numbers, pace = random.Random(1), policy.pace()
    tokens = time = 0.0
    rates = {drafts: [0.0, 0.0] for drafts in range(1, LONGEST + 1)}
    for _ in range(20_000):
        chances = [0.98 if numbers.random() < 0.75 else 0.1 for _ in range(LONGEST)]
        accepted = [numbers.random() < chance for chance in chances]
        run = next((i for i, hit in enumerate(accepted) if not hit), LONGEST)
        for drafts, totals in rates.items():
            totals[0] += min(run, drafts) + 1
            totals[1] += policy.cost[drafts]
        drafts = steps = 0
        going = pace.begins()
        while going:
            steps += 1
            if not pace.takes(chances[drafts]):
                break
            drafts += 1
            going = pace.continues()
        pace.settle(min(run, drafts))
        tokens += min(run, drafts) + 1
        time += policy.drafting(steps) + policy.verify[drafts]
    assert tokens / time > 1.03 * max(emitted / spent for emitted, spent in rates.values())


@pytest.mark.parametrize(("accept", "width"), [(0.8, 0.1), (0.6, 0.4), (0.9, 0.02), (0.5, 0.5), (0.3, 0.35)])
def test_the_length_of_a_batch_is_the_best_fixed_one(accept: float, width: float) -> None:
    policy = AdaptivePolicy(calibration(0.05, width, accept), 0.0, 16, None)
    rates = [fixed_rate(policy, accept, drafts) for drafts in range(LONGEST + 1)]
    best = max(range(LONGEST + 1), key=rates.__getitem__)
    assert policy.best_length == (best if rates[best] > 1.28 else 0)
    assert (policy.best_length == 0) == (accept < 0.65)


def test_it_never_drafts_more_than_the_drafter_can() -> None:
    policy = AdaptivePolicy(calibration(0.001, 0.001, 0.99), 0.0, 1, 2)
    pace = policy.pace()
    assert pace.begins()
    assert pace.takes(0.99)
    assert pace.continues()
    assert pace.takes(0.99)
    assert not pace.continues()


def test_a_dear_first_draft_step_is_paid_by_the_following_ones() -> None:
    """The hurdle may be the first draft step, too; once over it, drafts are as many as they would be without."""
    costs = Costs({1: 0.05}, {1: {1: 1.0, 17: 1.8}}, {1: 0.9})
    policy = AdaptivePolicy(Calibration("cpu", costs, [Acceptance(0.0, [0.9], [_logit(0.9), 0.0, 0.0])]), 0.0, 1, None)
    assert fixed_rate(policy, 0.9, 1) < 1
    rate, _ = play(policy, 0.9, 20_000)
    assert rate > 0.985 * max(fixed_rate(policy, 0.9, drafts) for drafts in range(LONGEST + 1))


def test_a_step_over_a_hurdle_is_looked_across() -> None:
    """The first extra token is dear and the following ones are cheap, as where a matrix-vector product becomes a
    matrix product: one draft does not pay, four do.
    """
    costs = Costs({1: 0.05}, {1: {1: 1.0, 2: 2.0, 17: 2.1}})
    policy = AdaptivePolicy(Calibration("cpu", costs, [Acceptance(0.0, [0.9], [_logit(0.9), 0.0, 0.0])]), 0.0, 1, None)
    assert fixed_rate(policy, 0.9, 1) < 1
    rate, drafts = play(policy, 0.9, 2_000)
    assert drafts > 3
    assert rate > 1.5


def test_decisions_depend_on_the_rows_own_past_alone() -> None:
    policy = AdaptivePolicy(calibration(0.1, 0.1, 0.65), 0.0, 1, None)
    alone = play(policy, 0.8, 300, seed=4)
    other = policy.pace()
    other.settle(0)
    assert play(policy, 0.8, 300, seed=4) == alone
