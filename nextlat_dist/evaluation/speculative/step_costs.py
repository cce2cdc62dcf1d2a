"""Costs of steps: one draft step and one verification of a batch, and the phases of real cycles.

    measure_costs(decoder, prompt_ids, batch_size, widths) -> StepCosts        step by step, nothing around them
    split_cycles(decoder, prompts, …) -> CycleSplit                            what decoding spends on which

With c the draft step and v(n) the forward over n tokens per row, both in units of a plain step of the same batch, a
cycle that drafts k tokens costs k·c + v(k + 1) plain steps and writes 1 + accepted tokens per row: the speedup that
acceptance allows. Invariant: v(1) is the plain step itself; all kinds of step alternate and the median counts, so a
slow spell of the machine moves none of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nextlat_dist.evaluation.speculative.records import Method
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import Cycle, DraftLength

WARM_UP_ROUNDS = 3
MEASURED_ROUNDS = 25
CHAIN = 4  # draft steps in a row, as a cycle has them
STAGGER = 8  # rows of a batch seldom stand at the same position, which would be cheaper


@dataclass(frozen=True)
class StepCosts:
    """Seconds of each kind of step for a batch of `batch_size` rows, picking the greedy tokens included.

    Attributes:
        draft_seconds: one draft step of the whole batch; None: the decoder has nothing to draft with.
        forward_seconds: block width n → one forward over n tokens per row; 1 is the plain step and always there.
    """

    batch_size: int
    draft_seconds: float | None
    forward_seconds: dict[int, float]

    @property
    def plain_seconds(self) -> float:
        return self.forward_seconds[1]

    @property
    def draft(self) -> float | None:
        """c, in plain steps of this batch."""
        return None if self.draft_seconds is None else self.draft_seconds / self.plain_seconds

    @property
    def verify(self) -> dict[int, float]:
        """v(n) by n, in plain steps of this batch; v(1) = 1."""
        return {n: seconds / self.plain_seconds for n, seconds in self.forward_seconds.items()}

    def to_json(self) -> dict[str, Any]:
        verify = {str(n): cost for n, cost in self.verify.items()}
        plain = {"batch_size": self.batch_size, "plain_step_seconds": self.plain_seconds}
        return plain | {"draft": self.draft, "verify": verify}

    def named(self, prefix: str = "") -> dict[str, float]:
        """Flat names: `plain_step_seconds`, `draft_cost`, `verify_cost_4`."""
        found = {f"{prefix}plain_step_seconds": self.plain_seconds}
        if self.draft is not None:
            found[f"{prefix}draft_cost"] = self.draft
        return found | {f"{prefix}verify_cost_{n}": cost for n, cost in self.verify.items()}


def costs_sentence(costs: Mapping[str, Any]) -> str:
    """`StepCosts.to_json()` in words."""
    verify = ", ".join(f"v({n}) = {cost:.2f}" for n, cost in costs["verify"].items() if n != "1")
    draft = "" if costs["draft"] is None else f"draft step c = {costs['draft']:.3f}; "
    return f"batch {costs['batch_size']}: plain step {costs['plain_step_seconds'] * 1e3:.2f} ms; {draft}{verify}"


@dataclass(frozen=True)
class ExportCosts:
    """Steps of one export at one batch size."""

    model: str
    steps: StepCosts

    @property
    def sentence(self) -> str:
        return f"{self.model}, {costs_sentence(self.steps.to_json())}"

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, **self.steps.to_json()}


@torch.inference_mode()
def measure_costs(
    decoder: Decoder, prompt_ids: list[int], batch_size: int, widths: Sequence[int], rounds: int = MEASURED_ROUNDS
) -> StepCosts:
    """Greedy steps of `batch_size` rows that stand at the end of `prompt_ids`, each some tokens before the next.

    Args:
        prompt_ids: at least as many as the context that the costs are to be true for; attention grows with it.
        widths: tokens per row of the forwards to measure; 1 is always added.
        rounds: how often each kind of step is taken, after a few that do not count.
    """
    llama, drafter, length = decoder.llama, decoder.drafter, len(prompt_ids)
    widths = sorted({1, *widths})
    cache = llama.new_cache(batch_size, length + widths[-1])
    memory = None if drafter is None else drafter.start(batch_size, cache.capacity)
    for states, counts in llama.prefill([prompt_ids] * batch_size, cache):
        last = states[torch.tensor(counts).cumsum(0) - 1]
        if memory is not None:
            memory.observe(states, counts, counts)
    lengths = [length - row % min(STAGGER, length) for row in range(batch_size)]
    token = llama.logits(last).argmax(dim=-1)

    def forward(width: int) -> None:
        cache.lengths = lengths.copy()
        states = llama.forward(token.repeat_interleave(width), [width] * batch_size, cache)
        llama.logits(states).argmax(dim=-1).tolist()  # waits for the device

    def draft() -> None:
        assert drafter is not None
        assert memory is not None
        memory.begin(last)
        following = token
        for _ in range(steps):
            following = memory.logits(following, None).argmax(dim=-1)
            if drafter.vocabulary is not None:
                following = drafter.vocabulary[following]
        following.tolist()

    steps = min(CHAIN, (drafter and drafter.longest) or CHAIN)
    kinds: dict[int, Callable[[], None]] = {width: partial(forward, width) for width in widths}
    if drafter is not None:
        kinds[0] = draft
    seconds: dict[int, list[float]] = {n: [] for n in kinds}
    for number in range(WARM_UP_ROUNDS + rounds):
        for n, take_step in kinds.items():
            started = time.perf_counter()
            take_step()
            if number >= WARM_UP_ROUNDS:
                seconds[n].append((time.perf_counter() - started) / (steps if n == 0 else 1))
    median = {n: statistics.median(times) for n, times in seconds.items()}
    return StepCosts(batch_size, median.get(0), {n: median[n] for n in widths})


@dataclass(frozen=True)
class CycleSplit:
    """Seconds of all cycles of a call: drafting, the base model's forward with picking tokens, and what is left."""

    cycles: int
    draft_seconds: float
    verify_seconds: float
    seconds: float

    @property
    def milliseconds(self) -> float:
        """Of one cycle."""
        return self.seconds / self.cycles * 1e3

    @property
    def shares(self) -> dict[str, float]:
        draft, verify = self.draft_seconds / self.seconds, self.verify_seconds / self.seconds
        return {"draft_share": draft, "verify_share": verify, "overhead_share": 1 - draft - verify}

    def to_json(self) -> dict[str, Any]:
        return {"cycles": self.cycles, "milliseconds_per_cycle": self.milliseconds, **self.shares}


def split_cycles(
    decoder: Decoder,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    draft_length: DraftLength,
    temperature: float,
    seed: int,
) -> CycleSplit:
    """Decode the batch `prompts` with a stopwatch between the phases.

    The stopwatch makes a fixed draft length look at confidences that it does not need, and a GPU wait between phases:
    speeds are measured without it.
    """
    cycles: list[Cycle] = []
    decoder.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        draft_length=draft_length,
        temperature=temperature,
        seed=seed,
        ignore_eos=True,
        on_cycle=cycles.append,
    )
    draft, verify, total = (sum(getattr(c, n) for c in cycles) for n in ("draft_seconds", "verify_seconds", "seconds"))
    return CycleSplit(len(cycles), draft, verify, total)


@dataclass(frozen=True)
class MethodSplit:
    """The cycles of one method at one batch size and temperature."""

    method: Method
    batch_size: int
    temperature: float
    cycles: CycleSplit

    def to_json(self) -> dict[str, Any]:
        where = {"batch_size": self.batch_size, "temperature": self.temperature}
        return {"model": self.method.model, **where, "draft_length": self.method.draft_length, **self.cycles.to_json()}
