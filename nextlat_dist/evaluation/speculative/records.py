"""Records of a measurement: methods, cells, what a method did in one trial, and in all trials of a cell.

`MethodInCell` is a row of the report. Its `to_json` is flat, so that a name in the JSON is a column of a data frame: an
estimate `speedup` is `speedup`, `speedup_low` and `speedup_high`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nextlat_dist.evaluation.speculative.paired_statistics import Estimate, estimate
from nextlat_dist.inference.generation import DraftLength

NEXTLAT, MTP = "nextlat", "mtp"  # names of exports that were given none: the main one, and that of --rival
HUGGING_FACE = "hugging_face"  # the main export in stock transformers
ALL = "all"  # all domains together


@dataclass(frozen=True)
class Method:
    """A way to decode: the name of an export with a draft length, or HUGGING_FACE, which drafts nothing (0) or by
    prompt lookup.
    """

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

    @property
    def description(self) -> str:
        return f"{self.domain} at batch {self.batch_size}, temperature {self.temperature:g}"

    def to_json(self) -> dict[str, Any]:
        return {"domain": self.domain, "batch_size": self.batch_size, "temperature": self.temperature}


@dataclass(frozen=True)
class Outcome:
    """What one method did in one trial, summed over the rows; `later_tokens` leaves out the prefill's first ones."""

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


Outcomes = Mapping[Method, Sequence[Outcome]]
"""Of one cell: by method, trial by trial; the main export comes first."""


def rates(trials: Sequence[Outcome]) -> np.ndarray:
    return np.array([trial.rate for trial in trials])


def cpu_rates(trials: Sequence[Outcome]) -> np.ndarray:
    """Later tokens per second that the machine gave to this process."""
    return np.array([trial.later_tokens / trial.cpu_seconds for trial in trials if trial.cpu_seconds is not None])


def on_cpu(trials: Sequence[Outcome]) -> bool:
    return all(trial.cpu_seconds is not None for trial in trials)


def tokens_per_cycle(trials: Sequence[Outcome]) -> float:
    return sum(trial.later_tokens for trial in trials) / sum(trial.cycles for trial in trials)


def added(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums by position; a shorter list has nothing further out."""
    longest = max(map(len, counts))
    return [sum(row[i] for row in counts if i < len(row)) for i in range(longest)]


@dataclass(frozen=True)
class MethodInCell:
    """One method in one cell: sums over its trials; rates, ratios and the prefill are medians over them.

    Attributes:
        speedup: over draft length 0 of the same model; that of HUGGING_FACE over the main export's.
        tokens_per_cpu_second, cpu_speedup: by processor time; None where an accelerator did the work.
        acceptance_by_position: of the cycles that drafted so far, the share that accepted this position too.
        greedy_differing: continuations that are not those of draft length 0; None where tokens are sampled.
    """

    method: Method
    cell: Cell
    trials: int
    tokens: int
    tokens_per_second: Estimate
    speedup: Estimate
    tokens_per_cpu_second: float | None
    cpu_speedup: float | None
    tokens_per_second_with_prefill: float
    speedup_with_prefill: float
    prefill_seconds: float
    cycles: int
    tokens_per_cycle: float
    acceptance_by_position: list[float]
    drafted_by_position: list[int]
    greedy_differing: int | None
    repeated_4gram_share: float

    @classmethod
    def of(cls, method: Method, cell: Cell, trials: Sequence[Outcome], baseline: Sequence[Outcome]) -> MethodInCell:
        with_prefill, baseline_with_prefill = (
            np.array([trial.rate_with_prefill for trial in one]) for one in (trials, baseline)
        )
        drafted = added([trial.drafted_by_position for trial in trials])
        accepted = added([trial.accepted_by_position for trial in trials])
        timed = on_cpu(trials) and on_cpu(baseline)
        return cls(
            method=method,
            cell=cell,
            trials=len(trials),
            tokens=sum(trial.tokens for trial in trials),
            tokens_per_second=estimate(rates(trials)),
            speedup=estimate(rates(trials) / rates(baseline)),
            tokens_per_cpu_second=float(np.median(cpu_rates(trials))) if timed else None,
            cpu_speedup=float(np.median(cpu_rates(trials) / cpu_rates(baseline))) if timed else None,
            tokens_per_second_with_prefill=float(np.median(with_prefill)),
            speedup_with_prefill=float(np.median(with_prefill / baseline_with_prefill)),
            prefill_seconds=float(np.median([trial.prefill_seconds for trial in trials])),
            cycles=sum(trial.cycles for trial in trials),
            tokens_per_cycle=tokens_per_cycle(trials),
            acceptance_by_position=[a / d for a, d in zip(accepted, drafted, strict=True) if d],
            drafted_by_position=drafted,
            greedy_differing=sum(trial.differing for trial in trials) if cell.temperature == 0 else None,
            repeated_4gram_share=sum(trial.repeated_share for trial in trials) / len(trials),
        )

    @property
    def accepted_tokens_per_cycle(self) -> float:
        """EOS is ignored and no draft goes beyond the last token: a cycle writes what it accepts and one more."""
        return self.tokens_per_cycle - 1

    def to_json(self) -> dict[str, Any]:
        by_processor = {"tokens_per_cpu_second": self.tokens_per_cpu_second, "cpu_speedup": self.cpu_speedup}
        return {
            "model": self.method.model,
            **self.cell.to_json(),
            "draft_length": self.method.draft_length,
            "turns": self.trials,
            "tokens": self.tokens,
            **self.tokens_per_second.named("tokens_per_second"),
            **self.speedup.named("speedup"),
            **(by_processor if self.cpu_speedup is not None else {}),
            "tokens_per_second_with_prefill": self.tokens_per_second_with_prefill,
            "speedup_with_prefill": self.speedup_with_prefill,
            "prefill_seconds": self.prefill_seconds,
            "cycles": self.cycles,
            "accepted_tokens_per_cycle": self.accepted_tokens_per_cycle,
            "tokens_per_cycle": self.tokens_per_cycle,
            "acceptance_by_position": self.acceptance_by_position,
            "drafted_by_position": self.drafted_by_position,
            "greedy_differing": self.greedy_differing,
            "repeated_4gram_share": self.repeated_4gram_share,
        }


def rows_of(cells: Mapping[Cell, Outcomes]) -> list[MethodInCell]:
    """A row per cell and method, in their order."""
    rows = []
    for cell, outcomes in cells.items():
        main = next(iter(outcomes)).model
        for method, trials in outcomes.items():
            baseline = outcomes[Method(main if method.model == HUGGING_FACE else method.model, 0)]
            rows.append(MethodInCell.of(method, cell, trials, baseline))
    return rows
