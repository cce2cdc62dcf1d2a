"""The methods of one cell against each other: the best fixed draft length, adaptive, other exports, transformers.

    compare(cells) -> list[CellComparison]

Nothing is measured here, and every ratio is taken within trials (`paired_statistics`). Tables, sentences and the flat
summary are views of these records. `to_json` is flat: numbers of the main export have their plain names, those of an
export `mtp` begin with `mtp_`; what was not measured is left out. `from_json` reads it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from nextlat_dist.evaluation.speculative.paired_statistics import Estimate, best_of, estimate
from nextlat_dist.evaluation.speculative.records import (
    HUGGING_FACE,
    Cell,
    Method,
    Outcome,
    Outcomes,
    cpu_rates,
    on_cpu,
    rates,
    tokens_per_cycle,
)

NEVER_SLOWER = 0.98  # of the baseline: what adaptive drafting may cost where drafting does not pay
ByLength = Mapping[Any, Sequence[Outcome]]  # one export's trials by draft length
CPU = "cpu_"  # numbers by processor time begin so: they hold for a machine that is busy with other work, too


@dataclass(frozen=True)
class Drafting:
    """Fixed and adaptive draft lengths of one export by one clock; None: not measured."""

    draft_length_fixed_best: int | None
    speedup_fixed_best: Estimate | None
    speedup_fixed_best_in_sample: float | None
    speedup_adaptive: Estimate | None
    adaptive_over_fixed_best: Estimate | None
    adaptive_over_fixed_best_in_sample: Estimate | None

    @classmethod
    def of(cls, by_length: Mapping[Any, np.ndarray], halves: np.ndarray) -> Drafting:
        """From rates by draft length, [trials] each; 0 is the baseline."""
        baseline, adaptive = by_length[0], by_length.get("adaptive")
        fixed = {length: own for length, own in by_length.items() if length not in (0, "adaptive")}
        best = best_of(fixed, baseline, halves) if fixed else None
        both = None if best is None or adaptive is None else (adaptive / best.rates, adaptive / best.in_sample)
        return cls(
            None if best is None else best.choice,
            None if best is None else estimate(best.rates / baseline),
            None if best is None else estimate(best.in_sample / baseline).value,
            None if adaptive is None else estimate(adaptive / baseline),
            None if both is None else estimate(both[0]),
            None if both is None else estimate(both[1]),
        )

    @property
    def adaptive_never_slower(self) -> bool | None:
        return None if self.speedup_adaptive is None else self.speedup_adaptive.value >= NEVER_SLOWER

    @property
    def adaptive_keeps_up(self) -> bool | None:
        """The interval of adaptive over the best fixed length reaches 1."""
        return None if self.adaptive_over_fixed_best is None else self.adaptive_over_fixed_best.high >= 1

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        names = (*(field.name for field in fields(self)), "adaptive_never_slower", "adaptive_keeps_up")
        return _flat({prefix + name: getattr(self, name) for name in names})

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], prefix: str = "") -> Drafting:
        return cls(
            entry.get(f"{prefix}draft_length_fixed_best"),
            Estimate.read(entry, f"{prefix}speedup_fixed_best"),
            entry.get(f"{prefix}speedup_fixed_best_in_sample"),
            Estimate.read(entry, f"{prefix}speedup_adaptive"),
            Estimate.read(entry, f"{prefix}adaptive_over_fixed_best"),
            Estimate.read(entry, f"{prefix}adaptive_over_fixed_best_in_sample"),
        )


@dataclass(frozen=True)
class ExportInCell:
    """One export.

    Attributes:
        drafting, cpu_drafting: by the clock and by processor time; the latter None where an accelerator did the work.
        accepted_fixed_best, accepted_adaptive, drafted_adaptive: tokens per cycle.
        accepted_held_out, speedup_with_prefill_held_out: of what `drafting.speedup_fixed_best` is about, each trial at
            the length that was the best in the other half.
    """

    model: str
    baseline_tokens_per_second: Estimate
    drafting: Drafting
    cpu_drafting: Drafting | None
    accepted_fixed_best: float | None
    accepted_adaptive: float | None
    drafted_adaptive: float | None
    accepted_held_out: float | None
    speedup_with_prefill_held_out: float | None

    @property
    def accepted(self) -> float | None:
        """What goes with `drafting.speedup_fixed_best`; files of earlier releases have no held-out acceptance."""
        return self.accepted_fixed_best if self.accepted_held_out is None else self.accepted_held_out

    @classmethod
    def of(cls, model: str, by_length: ByLength) -> ExportInCell:
        halves = _halves(by_length[0])
        drafting = Drafting.of({length: rates(trials) for length, trials in by_length.items()}, halves)
        timed = all(map(on_cpu, by_length.values())) and len(by_length) > 1
        fixed, adaptive = by_length.get(drafting.draft_length_fixed_best), by_length.get("adaptive")
        return cls(
            model,
            estimate(rates(by_length[0])),
            drafting,
            Drafting.of({length: cpu_rates(own) for length, own in by_length.items()}, halves) if timed else None,
            None if fixed is None else tokens_per_cycle(fixed) - 1,
            None if adaptive is None else tokens_per_cycle(adaptive) - 1,
            None if adaptive is None else _drafted_per_cycle(adaptive),
            *_held_out(by_length),
        )

    def to_json(self, prefix: str = "") -> dict[str, Any]:
        return {
            **self.baseline_tokens_per_second.named(f"{prefix}baseline_tokens_per_second"),
            **self.drafting.to_json(prefix),
            **({} if self.cpu_drafting is None else self.cpu_drafting.to_json(prefix + CPU)),
            **_flat({prefix + name: getattr(self, name) for name in _PER_CYCLE}),
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], model: str, prefix: str) -> ExportInCell:
        baseline = Estimate.read(entry, f"{prefix}baseline_tokens_per_second")
        assert baseline is not None, f"no baseline of {model}"
        by_processor = Drafting.from_json(entry, prefix + CPU)
        measured = by_processor if by_processor.to_json() else None
        per_cycle = (entry.get(prefix + name) for name in _PER_CYCLE)
        return cls(model, baseline, Drafting.from_json(entry, prefix), measured, *per_cycle)


_PER_CYCLE = (
    "accepted_fixed_best",
    "accepted_adaptive",
    "drafted_adaptive",
    "accepted_held_out",
    "speedup_with_prefill_held_out",
)


@dataclass(frozen=True)
class Lead:
    """How many times faster the main export is than another, each at its best way of drafting, cross-fitted alike."""

    main: str
    other: str
    ratio: Estimate
    cpu_ratio: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """`nextlat_over_mtp`, and whether its interval is beyond 1: `nextlat_ahead_of_mtp`; by both clocks."""
        found: dict[str, Any] = {}
        for clock, ratio in (("", self.ratio), (CPU, self.cpu_ratio)):
            if ratio is not None:
                found |= ratio.named(f"{clock}{self.main}_over_{self.other}")
                found[f"{clock}{self.main}_ahead_of_{self.other}"] = ratio.low > 1
        return found

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], main: str, other: str) -> Lead | None:
        ratio, cpu_ratio = (Estimate.read(entry, f"{clock}{main}_over_{other}") for clock in ("", CPU))
        return None if ratio is None else cls(main, other, ratio, cpu_ratio)


@dataclass(frozen=True)
class OutsideInCell:
    """HUGGING_FACE, without or with prompt lookup: in tokens per second, and over the main export's baseline."""

    name: str
    tokens_per_second: float
    over_baseline: Estimate

    def to_json(self) -> dict[str, Any]:
        name = self.name
        return {
            f"{name}_tokens_per_second": self.tokens_per_second,
            **self.over_baseline.named(f"{name}_over_baseline"),
        }


PLAIN_OUTSIDE, LOOKUP_OUTSIDE = HUGGING_FACE, f"{HUGGING_FACE}_prompt_lookup"


@dataclass(frozen=True)
class CellComparison:
    """All methods of a cell: the main export is the first; leads are over those others that were measured drafting."""

    cell: Cell
    exports: tuple[ExportInCell, ...]
    leads: tuple[Lead, ...]
    outside: tuple[OutsideInCell, ...]

    @property
    def main(self) -> ExportInCell:
        return self.exports[0]

    def lead(self, other: str) -> Lead | None:
        return next((lead for lead in self.leads if lead.other == other), None)

    def from_outside(self, name: str) -> OutsideInCell | None:
        return next((method for method in self.outside if method.name == name), None)

    def shared_json(self) -> dict[str, Any]:
        """What is not of one export alone."""
        parts = [*(method.to_json() for method in self.outside), *(lead.to_json() for lead in self.leads)]
        return {name: value for part in parts for name, value in part.items()}

    def to_json(self) -> dict[str, Any]:
        found = self.cell.to_json() | self.main.to_json()
        for other in self.exports[1:]:
            found |= other.to_json(f"{other.model}_")
        return found | self.shared_json()

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], models: Sequence[str]) -> CellComparison:
        """`models`: names of the exports, the main one first."""
        outside = []
        for name in (PLAIN_OUTSIDE, LOOKUP_OUTSIDE):
            ratio = Estimate.read(entry, f"{name}_over_baseline")
            if ratio is not None:
                outside.append(OutsideInCell(name, entry[f"{name}_tokens_per_second"], ratio))
        main, *others = models
        leads = [Lead.from_json(entry, main, other) for other in others]
        return cls(
            Cell(entry["domain"], entry["batch_size"], entry["temperature"]),
            tuple(ExportInCell.from_json(entry, model, "" if model == main else f"{model}_") for model in models),
            tuple(lead for lead in leads if lead is not None),
            tuple(outside),
        )


def compare(cells: Mapping[Cell, Outcomes]) -> list[CellComparison]:
    """Cell by cell, in their order."""
    return [_compare(cell, outcomes) for cell, outcomes in cells.items()]


def _compare(cell: Cell, outcomes: Outcomes) -> CellComparison:
    by_model: dict[str, dict[Any, Sequence[Outcome]]] = {}
    for method, trials in outcomes.items():
        by_model.setdefault(method.model, {})[method.draft_length] = trials
    outside = by_model.pop(HUGGING_FACE, {})
    main, *others = by_model
    leads = [_lead(main, other, by_model) for other in others]
    baseline = rates(outcomes[Method(main, 0)])
    return CellComparison(
        cell,
        tuple(ExportInCell.of(model, own) for model, own in by_model.items()),
        tuple(lead for lead in leads if lead is not None),
        tuple(
            OutsideInCell(
                LOOKUP_OUTSIDE if draft_length else PLAIN_OUTSIDE,
                estimate(rates(trials)).value,
                estimate(rates(trials) / baseline),
            )
            for draft_length, trials in outside.items()
        ),
    )


def _lead(main: str, other: str, by_model: Mapping[str, ByLength]) -> Lead | None:
    """None where one of the two was measured at draft length 0 alone."""
    both = by_model[main], by_model[other]
    if min(map(len, both)) < 2:
        return None
    timed = all(on_cpu(trials) for by_length in both for trials in by_length.values())
    return Lead(main, other, _ratio_of_best(*both, rates), _ratio_of_best(*both, cpu_rates) if timed else None)


def _ratio_of_best(own: ByLength, others: ByLength, rates_of: Callable[[Sequence[Outcome]], np.ndarray]) -> Estimate:
    def best(by_length: ByLength) -> np.ndarray:
        drafting = {length: rates_of(trials) for length, trials in by_length.items() if length != 0}
        return best_of(drafting, rates_of(by_length[0]), _halves(by_length[0])).rates

    return estimate(best(own) / best(others))


def _held_out(by_length: ByLength) -> tuple[float | None, float | None]:
    """Accepted per cycle, and speedup with the prefill, of every trial at the length chosen on the other half."""
    baseline = by_length[0]
    fixed = {length: rates(trials) for length, trials in by_length.items() if length not in (0, "adaptive")}
    if not fixed:
        return None, None
    lengths = best_of(fixed, rates(baseline), _halves(baseline)).held_out
    chosen = [by_length[length][trial] for trial, length in enumerate(lengths)]
    ratios = [own.rate_with_prefill / plain.rate_with_prefill for own, plain in zip(chosen, baseline, strict=True)]
    return tokens_per_cycle(chosen) - 1, float(np.median(ratios))


def _halves(trials: Sequence[Outcome]) -> np.ndarray:
    return np.array([trial.half for trial in trials])


def _drafted_per_cycle(trials: Sequence[Outcome]) -> float:
    return sum(sum(trial.drafted_by_position) for trial in trials) / sum(trial.cycles for trial in trials)


def _flat(named: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates by their three names; what is None is left out."""
    found: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, Estimate):
            found |= value.named(name)
        elif value is not None:
            found[name] = value
    return found
