"""Policies for the number of tokens to draft: a fixed one, or as many as pay.

The invariant behind losslessness: a decision is made from the row's own past and from the drafter's confidence *before*
the next token is sampled, and a token that was sampled is verified. Decisions of a row never depend on its neighbours;
at temperature > 0 they do depend on the number of rows of the batch, whose costs they weigh.

Adaptive drafting maximises tokens per time. A row that emits ρ tokens per unit of time should continue drafting while
the tokens it still expects, P(all accepted so far) · P(the next one) + …, exceed ρ times what they cost: the draft
steps and the wider verification. Acceptance comes from the calibration (by position, and given the confidence once it
is known), corrected by how the row's own drafts fared lately; costs come from the calibration at the batch's size.
Where even the best number of drafts would not pay, as at large batches, nothing is drafted and a cycle is a plain step.

The rows of a batch draft alike: `best_length`, which costs and acceptance of the calibration make the best at its size.
Rows that stop each at their own length were measured, too: at batch 8 and 32 that is 10 to 20% slower than one length
for all, because late draft steps are for few rows and blocks of unequal width have to be padded for attention.
"""

from __future__ import annotations

from math import log2
from typing import Protocol

from nextlat_dist.inference.speculative.calibration import Calibration

# Chosen by trial on CPUs, with small models; the output's distribution does not depend on any of them.
LONGEST = 16  # drafts of a cycle: costs are calibrated for up to 8 drafts and drawn out from there
MEMORY = 0.97  # of a row's record, per cycle: half of it is 23 cycles old or less
PRIOR_MISSES = 2.0  # misses, expected and seen, that a row's record begins with
PRIOR_TIME = 8.0  # plain steps of the calibrated rate that a row's record begins with
MISSES_RANGE = (0.1, 4.0)  # of the correction by the record
MARGIN = 0.02  # that drafting must gain over a plain step, for costs that were not measured exactly
# The same for a batch, per doubling of its rows: they end at different times, and the slowest of many lags further.
BATCH_MARGIN = 0.065


class Pace(Protocol):
    """One row's decisions. A cycle asks `begins`, then after each draft step `takes`, and if so `continues`, until one
    says no; then it calls `settle`.
    """

    def begins(self) -> bool:
        """Run a first draft step?"""

    def takes(self, confidence: float) -> bool:
        """Sample a draft from the step just run? `confidence` is the largest probability that it may be drawn with."""

    def continues(self) -> bool:
        """Run one more draft step?"""

    def settle(self, accepted: int) -> None:
        """The cycle kept `accepted` drafts."""


class Policy(Protocol):
    """What the rows of a batch share."""

    def pace(self) -> Pace:
        """A row's decisions, from its first cycle on."""


class AdaptivePolicy:
    """Drafts what pays, by the costs at the batch's size and the acceptance at its temperature."""

    def __init__(self, calibration: Calibration, temperature: float, rows: int, longest: int | None) -> None:
        self.longest = min(LONGEST, longest or LONGEST)
        self.rows = rows
        costs = calibration.costs_at(temperature).at(rows, self.longest)
        self.begin, self.draft, self.verify = costs.begin, costs.draft, costs.verify
        self.acceptance = calibration.acceptance_at(temperature)
        shares = self.acceptance.by_position[: self.longest]
        self.by_position = shares + shares[-1:] * (self.longest - len(shares))
        # Of a cycle with so many drafts, in plain steps of the batch.
        self.cost = [self.drafting(drafts) + verify for drafts, verify in enumerate(self.verify)]
        self.best_length, self.rate = self._best()

    def drafting(self, steps: int) -> float:
        """What so many draft steps of a cycle cost, in plain steps of the batch."""
        return self.begin + steps * self.draft if steps else 0.0

    def _best(self) -> tuple[int, float]:
        """The fixed number of drafts that pays best at the calibrated acceptance (0 if by less than the margin),
        and its tokens per plain step.
        """
        best, rate, tokens, survival = 0, 1.0, 1.0, 1.0
        for drafts, share in enumerate(self.by_position, start=1):
            survival *= share
            tokens += survival
            if tokens / self.cost[drafts] > rate:
                best, rate = drafts, tokens / self.cost[drafts]
        return (best if rate > 1 + MARGIN + BATCH_MARGIN * log2(self.rows) else 0), rate

    def pace(self) -> Pace:
        return AdaptivePace(self)


class AdaptivePace:
    """One row's pace; see the module."""

    def __init__(self, policy: AdaptivePolicy) -> None:
        self.policy = policy
        self.rate = policy.rate
        self.tokens = self.time = 0.0  # emitted, and what they cost in plain steps, lately
        self.missed = self.expected_misses = 0.0
        self._start_cycle()

    def _start_cycle(self) -> None:
        low, high = MISSES_RANGE
        ratio = (self.missed + PRIOR_MISSES) / (self.expected_misses + PRIOR_MISSES)
        self.misses = min(max(ratio, low), high)
        self.ahead = [self._corrected(share) for share in self.policy.by_position]
        self.survival = 1.0  # P(all drafts of this cycle so far are accepted)
        self.drafted: list[float] = []  # uncorrected P(accept) of each
        self.steps = 0

    def _corrected(self, share: float) -> float:
        return max(0.0, 1 - (1 - share) * self.misses)

    def _gain(self, first: int, survival: float, spent: float, least: int) -> float:
        """Most tokens to be gained by drafting on from position `first`, net of their cost at the row's rate.

        `spent` is what the cycle costs if it ends here; at least `least` drafts are made in all.
        """
        policy, rate = self.policy, self.rate
        best, tokens = float("-inf"), 0.0
        for drafts in range(first, policy.longest + 1):
            survival *= self.ahead[drafts - 1]
            tokens += survival
            if drafts >= least:
                best = max(best, tokens - rate * (policy.cost[drafts] - spent))
        return best

    def begins(self) -> bool:
        return self._gain(1, 1.0, self.policy.cost[0], 1) > MARGIN

    def takes(self, confidence: float) -> bool:
        policy = self.policy
        self.steps += 1
        position = len(self.drafted) + 1
        share = policy.acceptance.given(confidence, position)
        reached = self.survival * self._corrected(share)
        # The step has been paid for, whether its draft is taken or not.
        stop_cost = policy.drafting(self.steps) + policy.verify[position - 1]
        now = reached - self.rate * (policy.cost[position] - stop_cost)
        if now <= 0:
            later = self._gain(position + 1, reached, policy.cost[position], position + 1)
            if now + later <= 0:
                return False
        self.drafted.append(share)
        self.survival = reached
        return True

    def continues(self) -> bool:
        position = len(self.drafted)
        return self._gain(position + 1, self.survival, self.policy.cost[position], position + 1) > 0

    def settle(self, accepted: int) -> None:
        policy = self.policy
        self.missed = MEMORY * self.missed + (accepted < len(self.drafted))
        self.expected_misses *= MEMORY
        for share in self.drafted[: accepted + 1]:
            self.expected_misses += 1 - share
        self.tokens = MEMORY * self.tokens + accepted + 1
        self.time = MEMORY * self.time + policy.drafting(self.steps) + policy.verify[len(self.drafted)]
        self.rate = max(1.0, (self.tokens + PRIOR_TIME * policy.rate) / (self.time + PRIOR_TIME))
        self._start_cycle()
