"""Contenders that take turns on the same batches of prompts.

    plan_turns(domains, batch_sizes, temperatures, repeats, seed) -> list[Turn]
    take_turns(turns, sides, decoders, shown) -> Measured

A turn is one batch of prompts of one domain, continued by every contender, one after the other, in an order that
rotates from turn to turn. Invariant: whatever is compared was measured within the same turns, so a slow spell of the
machine moves neither side of a ratio. The turns of all cells (domain, batch size, temperature) are interleaved: a slow
hour is shared by all of them, and the time left can be told from the turns done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.generation import DraftLength, Generation
from nextlat_dist.inference.prompts import Prompt
from nextlat_dist.reporting import report

ALL = "all"
NEXTLAT, RIVAL, HUGGING_FACE = "nextlat", "mtp", "hugging_face"
REPETITION_ORDER = 4
LEAST_TURNS = 6  # of a cell: fewer would leave the intervals little to draw from


@dataclass(frozen=True)
class Contender:
    """`model` is NEXTLAT, RIVAL, or HUGGING_FACE, which drafts nothing (0) or by prompt lookup."""

    model: str
    draft_length: DraftLength | Literal["prompt_lookup"]


@dataclass(frozen=True)
class Cell:
    """What is reported apart; `domain` may be ALL."""

    domain: str
    batch_size: int
    temperature: float

    @property
    def prefix(self) -> str:
        """How the names of its numbers begin in a summary."""
        return f"{self.domain}_b{self.batch_size}_t{self.temperature:g}_"


@dataclass(frozen=True)
class EncodedPrompt:
    prompt: Prompt
    ids: list[int]


@dataclass(frozen=True)
class Turn:
    """One batch; `half` (0 or 1) is what it is for in a cross-fit, see `paired.best_of`."""

    cell: Cell
    prompts: list[EncodedPrompt]
    half: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one contender did in one turn, summed over the rows; `later_tokens` leaves out the prefill's first ones."""

    half: int
    rows: int
    tokens: int
    later_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cpu_seconds: float | None
    cycles: int
    drafted_by_position: list[int]
    accepted_by_position: list[int]
    differing: int  # rows whose greedy tokens are not those of the baseline
    repeated_share: float

    @property
    def rate(self) -> float:
        """Tokens per second of decoding: the first token of a row belongs to the prefill, as does its time."""
        return self.later_tokens / self.decode_seconds

    @property
    def rate_with_prefill(self) -> float:
        return self.tokens / (self.prefill_seconds + self.decode_seconds)


@dataclass(frozen=True)
class Run:
    """A contender's turn: a continuation of each prompt, EOS ignored, and the processor time of its cycles.

    `cpu_seconds` is what the machine gave to this process, and None where an accelerator did the work.
    """

    generations: list[Generation]
    cpu_seconds: float | None


Side = Callable[[list[list[int]], float, int], Run]
"""(prompts, temperature, seed) → its turn."""


@dataclass
class Measured:
    """Outcomes turn by turn, and the greedy rows that are not their baseline's."""

    outcomes: dict[Cell, dict[Contender, list[Outcome]]] = field(default_factory=dict)
    differences: list[dict[str, Any]] = field(default_factory=list)


def plan_turns(
    domains: Mapping[str, Sequence[EncodedPrompt]],
    batch_sizes: Sequence[int],
    temperatures: Sequence[float],
    repeats: int,
    seed: int,
) -> list[Turn]:
    """All turns in the order to take them.

    A pass over a domain is as many batches as hold every prompt, LEAST_TURNS at least; a batch that finds no further
    prompt goes on with the first. There are `repeats` passes, with other seeds. A batch keeps its half in all passes,
    so that the two halves share as few prompts as can be.
    """
    placed: list[tuple[float, Turn]] = []
    for domain, prompts in domains.items():
        for batch_size in batch_sizes:
            a_pass = max(LEAST_TURNS, -(-len(prompts) // batch_size))
            for temperature in temperatures:
                cell = Cell(domain, batch_size, temperature)
                for index in range(a_pass * repeats):
                    first = index % a_pass * batch_size
                    rows = [prompts[(first + row) % len(prompts)] for row in range(batch_size)]
                    turn = Turn(cell, rows, index % a_pass % 2, seed + index * batch_size)
                    placed.append(((index + 0.5) / (a_pass * repeats), turn))
    return [turn for _, turn in sorted(placed, key=lambda item: item[0])]


def take_turns(
    turns: Sequence[Turn],
    sides: Mapping[Contender, Side],
    decoders: Mapping[str, Decoder],
    shown: bool,
) -> Measured:
    """Let every contender have every turn; those of Hugging Face only the ones of a single row.

    Args:
        decoders: by `Contender.model`, to look into greedy differences with.
    """
    measured = Measured()
    progress = report.Progress("evaluate speculative", len(turns), shown)
    for number, turn in enumerate(turns):
        contenders = [c for c in sides if c.model != HUGGING_FACE or turn.cell.batch_size == 1]
        first = number % len(contenders)
        runs: dict[Contender, Run] = {}
        for contender in contenders[first:] + contenders[:first]:
            ids = [row.ids for row in turn.prompts]
            runs[contender] = sides[contender](ids, turn.cell.temperature, turn.seed)
        cell = measured.outcomes.setdefault(turn.cell, {})
        for contender in contenders:
            model = NEXTLAT if contender.model == HUGGING_FACE else contender.model
            baseline, generations = runs[Contender(model, 0)].generations, runs[contender].generations
            differing = _differing(turn, baseline, generations)
            cell.setdefault(contender, []).append(_outcome(turn, runs[contender], len(differing)))
            if contender.model in decoders:
                for row in differing:
                    measured.differences.append(
                        {
                            "model": contender.model,
                            "domain": turn.cell.domain,
                            "prompt": turn.prompts[row].prompt.name,
                            "batch_size": turn.cell.batch_size,
                            "draft_length": contender.draft_length,
                        }
                        | first_difference(
                            decoders[contender.model],
                            turn.prompts[row].ids,
                            baseline[row].token_ids,
                            generations[row].token_ids,
                        )
                    )
        progress.add(sum(len(g.token_ids) for run in runs.values() for g in run.generations))
    return measured


def over_all_domains(measured: Measured) -> dict[Cell, dict[Contender, list[Outcome]]]:
    """The outcomes of every cell, and those of all domains together under ALL."""
    cells = dict(measured.outcomes)
    for cell, outcomes in measured.outcomes.items():
        pooled = cells.setdefault(Cell(ALL, cell.batch_size, cell.temperature), {})
        for contender, turns in outcomes.items():
            pooled.setdefault(contender, []).extend(turns)
    return cells


def first_difference(
    decoder: Decoder, prompt_ids: list[int], expected: list[int], actual: list[int]
) -> dict[str, int | float]:
    """Where two greedy continuations part, and how far the base model's logits of the two tokens lie apart there.

    A gap at the level of rounding is a near tie that two orders of the same sum settled differently; a larger one is
    an error.
    """
    position = next(i for i, (a, b) in enumerate(zip(expected, actual, strict=True)) if a != b)
    tokens = prompt_ids + expected[:position]
    with torch.inference_mode():
        *_, (states, _) = decoder.llama.prefill([tokens], decoder.llama.new_cache(1, len(tokens)))
        logits = decoder.llama.logits(states[-1:])[0]
    gap = float((logits[expected[position]] - logits[actual[position]]).abs())
    return {"position": position, "logit_gap": gap}


def repeated_share(token_ids: list[int]) -> float:
    """The share of n-grams (n = REPETITION_ORDER) that occurred before in the same continuation."""
    grams = [tuple(token_ids[i : i + REPETITION_ORDER]) for i in range(len(token_ids) - REPETITION_ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _differing(turn: Turn, baseline: list[Generation], generations: list[Generation]) -> list[int]:
    if turn.cell.temperature > 0:
        return []
    pairs = zip(baseline, generations, strict=True)
    return [row for row, (a, b) in enumerate(pairs) if a.token_ids != b.token_ids]


def _outcome(turn: Turn, run: Run, differing: int) -> Outcome:
    generations = run.generations
    tokens = sum(len(g.token_ids) for g in generations)
    return Outcome(
        half=turn.half,
        rows=len(generations),
        tokens=tokens,
        later_tokens=tokens - len(generations),
        prefill_seconds=max(g.prefill_seconds for g in generations),
        decode_seconds=max(g.decode_seconds for g in generations),
        cpu_seconds=run.cpu_seconds,
        cycles=sum(g.cycles for g in generations),
        drafted_by_position=added([g.drafted_by_position for g in generations]),
        accepted_by_position=added([g.accepted_by_position for g in generations]),
        differing=differing,
        repeated_share=sum(repeated_share(g.token_ids) for g in generations) / len(generations),
    )


def added(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums by place; a shorter list has nothing further out."""
    longest = max(map(len, counts))
    return [sum(row[i] for row in counts if i < len(row)) for i in range(longest)]
