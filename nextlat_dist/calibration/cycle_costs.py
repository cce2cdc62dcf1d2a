"""The costs of drafting and verifying in the decoding loop itself, at several batch sizes.

Every cycle of a batch drafts another number of tokens in turn, whatever they are, on the path that adaptive drafting
takes: the costs hold all that a cycle does, and a slow spell of the machine moves none of them against the others. The
median counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.engine.engine import DecodingEngine
from nextlat_dist.inference.generation import Cycle, Request
from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.speculative.calibration import Costs
from nextlat_dist.inference.stopping import Stops
from nextlat_dist.reporting.console import Progress

DRAFTS = (0, 1, 2, 4, 8)  # per cycle
GREEDY = Sampling()
PROMPT_TOKENS = 128  # of each row, or less
WARM_UP_ROUNDS = 1
MOST_ROUNDS, FEWEST_ROUNDS, ROUND_ROWS = 25, 4, 200  # of each number of drafts; large batches are slow and need fewer


def increasing(values: Sequence[float]) -> list[float]:
    """The nearest values that never fall (isotonic regression): a wider block costs no less, whatever the clock."""
    pools: list[tuple[float, int]] = []  # (mean, count)
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, count = (mean * count + before * more) / (count + more), count + more
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


class _TakingTurnsPace:
    """A pace that drafts another number of tokens in each cycle, whatever they are."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.cycles = self.taken = 0

    def begins(self) -> bool:
        return self._length > 0

    def takes(self, confidence: float) -> bool:
        self.taken += 1
        return True

    def continues(self) -> bool:
        return self.taken < self._length

    def settle(self, accepted: int) -> None:
        self.cycles += 1
        self.taken = 0

    @property
    def _length(self) -> int:
        return self.lengths[self.cycles % len(self.lengths)]


class _TakingTurns:
    """All rows of a batch draft the same number of tokens in a cycle."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def pace(self) -> _TakingTurnsPace:
        return _TakingTurnsPace(self.lengths)


def measure_cycle_costs(
    decoder: Decoder,
    prompts: list[list[int]],
    batch_sizes: Sequence[int],
    seed: int,
    progress: bool,
    sampling: Sampling = GREEDY,
) -> Costs:
    """Costs of drafting and verifying at each batch size, which begin with 1, with tokens picked as `sampling` says."""
    context = decoder.llama.config.max_position_embeddings
    longest_prompt = min(PROMPT_TOKENS, context // 4)
    longest = decoder.drafter.longest if decoder.drafter else None
    lengths = sorted({min(drafts, longest or drafts) for drafts in DRAFTS})
    cycles: dict[int, dict[int, list[Cycle]]] = {}
    kind = "greedy" if sampling.greedy else "sampled"
    shown = Progress(f"calibrate, costs of {kind} cycles", len(batch_sizes), progress)
    for size in batch_sizes:
        rows = [prompts[row % len(prompts)][-longest_prompt:] for row in range(size)]
        cycles[size] = cycles_in_turn(decoder, rows, lengths, seed, sampling)
        if cycles[size].keys() != set(lengths):
            raise UserError(
                f"the model's context of {context} tokens is too short to time cycles of up to {lengths[-1]} drafts; "
                "export a model with max_position_embeddings of 64 or more"
            )
        shown.add(sum(sum(cycle.accepted) + size for part in cycles[size].values() for cycle in part))
    return median_costs(cycles)


def first_and_further(drafting: dict[int, float]) -> tuple[float, float]:
    """Seconds that the first draft step takes beyond the others, and those of any step, from seconds of k steps: the
    nearest line; without a start where that would be negative.
    """
    steps, seconds = np.array(list(drafting), dtype=np.float64), np.array(list(drafting.values()))
    through_origin = float(steps @ seconds / (steps @ steps))
    if len(steps) == 1:
        return 0.0, through_origin
    further, first = np.polyfit(steps, seconds, 1)
    return (float(first), float(further)) if first > 0 and further > 0 else (0.0, through_origin)


def median_costs(cycles: dict[int, dict[int, list[Cycle]]]) -> Costs:
    """`cycles[rows][drafts]`, in units of the plain step (no drafts) at batch size 1."""
    draft: dict[int, float] = {}
    begin: dict[int, float] = {}
    verify: dict[int, dict[int, float]] = {}
    for size, by_drafts in cycles.items():
        drafting = {k: statistics.median(c.draft_seconds for c in part) for k, part in by_drafts.items() if k}
        begin[size], draft[size] = first_and_further(drafting)
        seconds = [statistics.median(c.seconds - c.draft_seconds for c in part) for part in by_drafts.values()]
        verify[size] = dict(zip((k + 1 for k in by_drafts), increasing(seconds), strict=True))
    unit = verify[1][1]
    return Costs(
        {size: seconds / unit for size, seconds in draft.items()},
        {size: {width: seconds / unit for width, seconds in line.items()} for size, line in verify.items()},
        {size: seconds / unit for size, seconds in begin.items()},
    )


def cycles_in_turn(
    decoder: Decoder, rows: list[list[int]], lengths: Sequence[int], seed: int, sampling: Sampling = GREEDY
) -> dict[int, list[Cycle]]:
    """Cycles of the whole batch by their number of drafts, ascending, without the first round."""
    rounds = WARM_UP_ROUNDS + min(max(ROUND_ROWS // len(rows), FEWEST_ROUNDS), MOST_ROUNDS)
    tokens = rounds * sum(length + 1 for length in lengths) + 1
    seen: list[Cycle] = []
    request = Request(tokens, "adaptive", sampling, Stops(frozenset()))
    policy = _TakingTurns(lengths)
    seeds = range(seed, seed + len(rows))
    batch = DecodingEngine(decoder.llama, decoder.drafter, rows, request, policy, seeds, seen.append)
    pieces = batch.run()
    while len(batch.rows) == len(rows) and len(seen) < rounds * len(lengths):
        next(pieces)
    cycles: dict[int, list[Cycle]] = {}
    for number, cycle in enumerate(seen):
        length = lengths[number % len(lengths)]
        whole = len(cycle.rows) == len(rows) and all(len(drafted) == length for drafted in cycle.confidences)
        if number >= WARM_UP_ROUNDS * len(lengths) and whole:
            cycles.setdefault(length, []).append(cycle)
    return cycles
