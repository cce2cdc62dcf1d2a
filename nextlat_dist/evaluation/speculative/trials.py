"""Trials: one batch of prompts of one domain, continued by every method, one method after the other.

    plan_trials(domains, batch_sizes, temperatures, repeats, seed) -> list[Trial]
    run_trials(trials, methods, decoders, shown) -> TrialResults

The order of the methods rotates from trial to trial. Invariant: whatever is compared was measured within the same
trials, so a slow spell of the machine moves neither part of a ratio. The trials of all cells (domain, batch size,
temperature) are interleaved: a slow hour is shared by all of them, and the time left can be told from the trials done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nextlat_dist.evaluation.speculative.records import ALL, HUGGING_FACE, Cell, Method, Outcome, added
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import Generation
from nextlat_dist.inference.prompts import Prompt
from nextlat_dist.reporting.console import Progress

REPETITION_ORDER = 4
LEAST_TRIALS = 6  # of a cell: fewer would leave the intervals little to draw from


@dataclass(frozen=True)
class EncodedPrompt:
    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Trial:
    """One batch; `half` (0 or 1) is what it is for in a cross-fit, see `paired_statistics.best_of`."""

    cell: Cell
    prompts: list[EncodedPrompt]
    half: int
    seed: int


@dataclass(frozen=True)
class Decoded:
    """A continuation of each prompt, EOS ignored, and the processor time of its cycles.

    `cpu_seconds` is what the machine gave to this process, and None where an accelerator did the work. It is 0 where
    the clock of the process ticks too slowly to see it, as it does under `ulimit -t`.
    """

    generations: list[Generation]
    cpu_seconds: float | None


Decode = Callable[[list[list[int]], float, int], Decoded]
"""(prompts, temperature, seed) → what a method made of them."""


@dataclass(frozen=True)
class GreedyDifference:
    """A greedy continuation that is not the baseline's: where the two part, and how far the base model's logits of the
    two tokens lie apart there.
    """

    method: Method
    cell: Cell
    prompt: str
    position: int
    logit_gap: float

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.method.model,
            "domain": self.cell.domain,
            "prompt": self.prompt,
            "batch_size": self.cell.batch_size,
            "draft_length": self.method.draft_length,
            "position": self.position,
            "logit_gap": self.logit_gap,
        }


@dataclass
class TrialResults:
    """Outcomes trial by trial, and the greedy rows that are not their baseline's."""

    outcomes: dict[Cell, dict[Method, list[Outcome]]] = field(default_factory=dict)
    differences: list[GreedyDifference] = field(default_factory=list)


def plan_trials(
    domains: Mapping[str, Sequence[EncodedPrompt]],
    batch_sizes: Sequence[int],
    temperatures: Sequence[float],
    repeats: int,
    seed: int,
) -> list[Trial]:
    """All trials in the order to run them.

    A pass over a domain is as many batches as hold every prompt, LEAST_TRIALS at least; a batch that finds no further
    prompt continues with the first. There are `repeats` passes, with other seeds. A batch keeps its half in all passes,
    so that the two halves share as few prompts as can be.
    """
    placed: list[tuple[float, Trial]] = []
    for domain, prompts in domains.items():
        for batch_size in batch_sizes:
            a_pass = max(LEAST_TRIALS, -(-len(prompts) // batch_size))
            for temperature in temperatures:
                cell = Cell(domain, batch_size, temperature)
                for index in range(a_pass * repeats):
                    first = index % a_pass * batch_size
                    rows = [prompts[(first + row) % len(prompts)] for row in range(batch_size)]
                    trial = Trial(cell, rows, index % a_pass % 2, seed + index * batch_size)
                    placed.append(((index + 0.5) / (a_pass * repeats), trial))
    return [trial for _, trial in sorted(placed, key=lambda item: item[0])]


def run_trials(
    trials: Sequence[Trial],
    methods: Mapping[Method, Decode],
    decoders: Mapping[str, Decoder],
    shown: bool,
) -> TrialResults:
    """Every trial by every method; HUGGING_FACE has only those of a single row.

    Args:
        methods: those of the main export come first.
        decoders: by `Method.model`, to look into greedy differences with.
    """
    measured = TrialResults()
    main = next(iter(methods)).model
    progress = Progress("evaluate speculative", len(trials), shown)
    for number, trial in enumerate(trials):
        own = [method for method in methods if method.model != HUGGING_FACE or trial.cell.batch_size == 1]
        first = number % len(own)
        decoded: dict[Method, Decoded] = {}
        for method in own[first:] + own[:first]:
            ids = [row.ids for row in trial.prompts]
            decoded[method] = methods[method](ids, trial.cell.temperature, trial.seed)
        cell = measured.outcomes.setdefault(trial.cell, {})
        for method in own:
            model = main if method.model == HUGGING_FACE else method.model
            baseline, generations = decoded[Method(model, 0)].generations, decoded[method].generations
            differing = _differing(trial, baseline, generations)
            cell.setdefault(method, []).append(_outcome(trial, decoded[method], len(differing)))
            if method.model in decoders:
                for row in differing:
                    where = first_difference(
                        decoders[method.model],
                        trial.prompts[row].ids,
                        baseline[row].token_ids,
                        generations[row].token_ids,
                    )
                    name = trial.prompts[row].prompt.name
                    measured.differences.append(GreedyDifference(method, trial.cell, name, *where))
        progress.add(sum(len(g.token_ids) for one in decoded.values() for g in one.generations))
    return measured


def over_all_domains(measured: TrialResults) -> dict[Cell, dict[Method, list[Outcome]]]:
    """The outcomes of every cell, and those of all domains together under ALL."""
    cells = dict(measured.outcomes)
    for cell, outcomes in measured.outcomes.items():
        pooled = cells.setdefault(Cell(ALL, cell.batch_size, cell.temperature), {})
        for method, trials in outcomes.items():
            pooled.setdefault(method, []).extend(trials)
    return cells


def first_difference(
    decoder: Decoder, prompt_ids: list[int], expected: list[int], actual: list[int]
) -> tuple[int, float]:
    """Where two greedy continuations part, and how far the base model's logits of the two tokens lie apart there.

    A gap at the level of rounding is a near tie that two orders of the same sum settled differently; a larger one is
    an error.
    """
    position = next(i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b)
    tokens = prompt_ids + expected[:position]
    with torch.inference_mode():
        *_, (states, _) = decoder.llama.prefill([tokens], decoder.llama.new_cache(1, len(tokens)))
        logits = decoder.llama.logits(states[-1:])[0]
    return position, float((logits[expected[position]] - logits[actual[position]]).abs())


def repeated_share(token_ids: list[int]) -> float:
    """The share of n-grams (n = REPETITION_ORDER) that occurred before in the same continuation."""
    grams = [tuple(token_ids[i : i + REPETITION_ORDER]) for i in range(len(token_ids) - REPETITION_ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _differing(trial: Trial, baseline: list[Generation], generations: list[Generation]) -> list[int]:
    if trial.cell.temperature > 0:
        return []
    pairs = zip(baseline, generations, strict=True)
    return [row for row, (a, b) in enumerate(pairs) if a.token_ids != b.token_ids]


def _outcome(trial: Trial, decoded: Decoded, differing: int) -> Outcome:
    generations = decoded.generations
    tokens = sum(len(g.token_ids) for g in generations)
    return Outcome(
        half=trial.half,
        rows=len(generations),
        tokens=tokens,
        later_tokens=tokens - len(generations),
        prefill_seconds=max(g.prefill_seconds for g in generations),
        decode_seconds=max(g.decode_seconds for g in generations),
        cpu_seconds=decoded.cpu_seconds or None,
        cycles=sum(g.cycles for g in generations),
        drafted_by_position=added([g.drafted_by_position for g in generations]),
        accepted_by_position=added([g.accepted_by_position for g in generations]),
        differing=differing,
        repeated_share=sum(repeated_share(g.token_ids) for g in generations) / len(generations),
    )
