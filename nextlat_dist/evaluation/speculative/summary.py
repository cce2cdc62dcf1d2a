"""Views of the records: the flat summary, the tables, and the verdicts in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nextlat_dist.evaluation.speculative.comparison import (
    CPU,
    LOOKUP_OUTSIDE,
    NEVER_SLOWER,
    PLAIN_OUTSIDE,
    CellComparison,
)
from nextlat_dist.evaluation.speculative.paired_statistics import Estimate
from nextlat_dist.evaluation.speculative.records import ALL, MTP, NEXTLAT, Cell, Method, MethodInCell

CAVEAT = (
    "The greedy text of a small model falls into loops, and a loop is easy to draft: the greedy numbers flatter "
    "acceptance. Read them together with the share of repeated 4-grams and with the numbers at temperature 1."
)
_CLOCKS = {"": "By the clock", CPU: "By processor time"}
_LABELS = {NEXTLAT: "NextLat", MTP: "MTP"}
_CELL_COLUMNS = (
    ("batch", "{cell.batch_size}"),
    ("temperature", "{cell.temperature:g}"),
    ("domain", "{cell.domain}"),
)
_OWN_COLUMNS = (
    ("tokens/s plain", "{main.baseline_tokens_per_second.value:.0f}"),
    ("best fixed", "{drafting.draft_length_fixed_best}"),
    ("speedup", "{drafting.speedup_fixed_best.value:.2f}"),
    ("accepted", "{main.accepted:.2f}"),
)
_ADAPTIVE_COLUMNS = (
    ("adaptive", "{drafting.speedup_adaptive.value:.2f}"),
    ("(95%)", "{drafting.speedup_adaptive.low:.2f}–{drafting.speedup_adaptive.high:.2f}"),
    ("accepted", "{main.accepted_adaptive:.2f}"),
    ("adaptive/fixed", "{drafting.adaptive_over_fixed_best.value:.3f}"),
    ("(95%)", "{drafting.adaptive_over_fixed_best.low:.3f}–{drafting.adaptive_over_fixed_best.high:.3f}"),
)
_OUTSIDE_COLUMNS = (
    ("transformers/plain", "{outside.over_baseline.value:.2f}"),
    ("with prompt lookup", "{lookup.over_baseline.value:.2f}"),
)


@dataclass(frozen=True)
class Claim:
    """What is said of every single cell, and how it went.

    Attributes:
        name: in the summary.
        words: "By the clock, …", without the cells.
        cases: the cells, each with the ratio that the claim is about, and whether it holds there.
    """

    name: str
    words: str
    cases: tuple[tuple[Cell, Estimate, bool], ...]

    @property
    def sentence(self) -> str:
        """With the cell that speaks most against it."""
        cell, ratio, _ = min(self.cases, key=lambda case: case[1].value)
        held = sum(held for _, _, held in self.cases)
        return (
            f"{self.words} in {held} of {len(self.cases)} cells; the lowest ratio is {ratio.value:.3f} "
            f"({ratio.low:.3f}–{ratio.high:.3f}), {cell.description}."
        )


def claims(compared: Sequence[CellComparison]) -> list[Claim]:
    """Those that were measured, about single domains: all domains together are not a domain."""
    single = [entry for entry in compared if entry.cell.domain != ALL]
    main, *others = [export.model for export in compared[0].exports]
    found = []
    for name, words, ratio_of, held_of in (
        (
            "adaptive_keeps_up",
            "adaptive keeps up with the best fixed draft length, within its confidence interval,",
            lambda drafting: drafting.adaptive_over_fixed_best,
            lambda drafting: drafting.adaptive_keeps_up,
        ),
        (
            "adaptive_never_slower",
            f"adaptive reaches {NEVER_SLOWER} of plain decoding's speed",
            lambda drafting: drafting.speedup_adaptive,
            lambda drafting: drafting.adaptive_never_slower,
        ),
    ):
        for clock in _CLOCKS:
            by_cell = ((entry.cell, entry.main.cpu_drafting if clock else entry.main.drafting) for entry in single)
            cases = ((cell, ratio_of(own), held_of(own)) for cell, own in by_cell if own is not None)
            found.append(_claim(clock, name, words, cases))
    for other in others:
        words = f"{label(main)} writes more tokens per second than {label(other)}, beyond its confidence interval,"
        for clock in _CLOCKS:
            leads = ((entry.cell, entry.lead(other)) for entry in single)
            ratios = ((cell, lead.cpu_ratio if clock else lead.ratio) for cell, lead in leads if lead is not None)
            cases = ((cell, ratio, ratio is not None and ratio.low > 1) for cell, ratio in ratios)
            found.append(_claim(clock, f"{main}_ahead_of_{other}", words, cases))
    return [claim for claim in found if claim.cases]


def _claim(clock: str, name: str, words: str, cases: Iterable[tuple[Cell, Estimate | None, Any]]) -> Claim:
    measured = tuple((cell, ratio, bool(held)) for cell, ratio, held in cases if ratio is not None)
    return Claim(clock + name, f"{_CLOCKS[clock]}, {words}", measured)


def summarise(compared: Sequence[CellComparison]) -> dict[str, Any]:
    """The cells' numbers by flat names, `code_b1_t0_speedup_adaptive`, `mtp_code_b1_t0_…`, and whether the claims hold.

    `adaptive_keeps_up`: in every domain, batch size and temperature the interval of adaptive over the best fixed length
    (cross-fitted) reaches 1. `adaptive_never_slower`: everywhere the median of adaptive is ≥ 0.98 of the baseline.
    """
    summary: dict[str, Any] = {}
    for entry in compared:
        prefix = entry.cell.prefix
        summary |= entry.main.to_json(prefix)
        for other in entry.exports[1:]:
            summary |= other.to_json(f"{other.model}_{prefix}")
        summary |= {prefix + name: value for name, value in entry.shared_json().items()}
    return summary | {claim.name: all(held for _, _, held in claim.cases) for claim in claims(compared)}


def headline(compared: Sequence[CellComparison], rows: Sequence[MethodInCell]) -> dict[str, Any]:
    """Numbers by plain name, of all domains at the smallest batch: greedy, and the last temperature as `sampled_…`.

    `draft_length` (`sampled_draft_length`) is the best fixed length over all trials. `speedup` and what belongs to it
    are held out: each half of the trials at the length that was the best in the other half. `speedup_in_sample` is what
    hindsight makes of it.
    """
    found: dict[str, Any] = {}
    batch_size = min(entry.cell.batch_size for entry in compared)
    temperatures = sorted({entry.cell.temperature for entry in compared})
    for temperature in {temperatures[0], temperatures[-1]}:
        cell = Cell(ALL, batch_size, temperature)
        prefix = "sampled_" if temperature else ""
        (entry,) = (entry for entry in compared if entry.cell == cell)
        main, drafting = entry.main, entry.main.drafting
        named: dict[str, Any] = {"baseline_tokens_per_second": main.baseline_tokens_per_second.value}
        if drafting.speedup_fixed_best is not None and main.accepted_held_out is not None:
            named |= {"draft_length": drafting.draft_length_fixed_best} | drafting.speedup_fixed_best.named("speedup")
            named |= {
                "speedup_in_sample": drafting.speedup_fixed_best_in_sample,
                "speedup_with_prefill": main.speedup_with_prefill_held_out,
                "accepted_tokens_per_cycle": main.accepted_held_out,
                "tokens_per_cycle": main.accepted_held_out + 1,
            }
        if drafting.speedup_adaptive is not None:
            named |= drafting.speedup_adaptive.named("speedup_adaptive")
            named["accepted_adaptive"] = main.accepted_adaptive
        baseline = Method(main.model, 0)
        (plain,) = (row for row in rows if row.cell == cell and row.method == baseline)
        named["repeated_4gram_share"] = plain.repeated_4gram_share
        found |= {prefix + name: value for name, value in named.items()}
    return found


def greedy_sentence(summary: Mapping[str, Any]) -> str:
    """Of a summary with a greedy temperature."""
    if summary["greedy_identical"]:
        return "Greedy output is token for token that of plain decoding, for every prompt and draft length."
    return (
        f"{summary['greedy_differences']} greedy continuations differ from plain decoding; where they part, the logits "
        f"of the two tokens lie at most {summary['greedy_largest_logit_gap']:.1e} apart."
    )


def label(model: str) -> str:
    """An export's name in words."""
    return _LABELS.get(model, model)


Table = tuple[Sequence[tuple[str, str]], Sequence[Mapping[str, Any]]]


def tables(compared: Sequence[CellComparison]) -> list[Table]:
    """Columns and rows for `reporting.tables`, by batch size, temperature, domain: the main export, then the others.

    Only what was measured has columns, and the second table is there only if it has any.
    """
    ordered = sorted(compared, key=lambda entry: (entry.cell.batch_size, entry.cell.temperature))
    adaptive = any(entry.main.drafting.speedup_adaptive is not None for entry in compared)
    own = (*_CELL_COLUMNS, *_OWN_COLUMNS, *(_ADAPTIVE_COLUMNS if adaptive else ()))
    found: list[Table] = [(own, [_fields(entry) for entry in ordered])]
    leads = [column for entry in compared[:1] for column in _lead_columns(entry)]
    outside = [entry for entry in ordered if entry.outside]
    if leads or outside:
        columns = (*_CELL_COLUMNS, *leads, *(_OUTSIDE_COLUMNS if outside else ()))
        found.append((columns, [_fields(entry) for entry in (ordered if leads else outside)]))
    return found


def _lead_columns(entry: CellComparison) -> list[tuple[str, str]]:
    columns: list[tuple[str, str]] = []
    for number, other in enumerate(entry.exports[1:]):
        if entry.lead(other.model) is not None:
            name, lead = f"other{number}", f"lead{number}.ratio"
            columns += [
                (f"{label(other.model)} best fixed", f"{{{name}.drafting.draft_length_fixed_best}}"),
                ("speedup", f"{{{name}.drafting.speedup_fixed_best.value:.2f}}"),
                ("accepted", f"{{{name}.accepted:.2f}}"),
                ("adaptive", f"{{{name}.drafting.speedup_adaptive.value:.2f}}"),
                (f"{label(entry.main.model)}/{label(other.model)} tokens/s", f"{{{lead}.value:.2f}}"),
                ("(95%)", f"{{{lead}.low:.2f}}–{{{lead}.high:.2f}}"),
            ]
    return columns


def _fields(entry: CellComparison) -> dict[str, Any]:
    """What the columns speak about, by short names."""
    found: dict[str, Any] = {"cell": entry.cell, "main": entry.main, "drafting": entry.main.drafting}
    found |= {"outside": entry.from_outside(PLAIN_OUTSIDE), "lookup": entry.from_outside(LOOKUP_OUTSIDE)}
    for number, other in enumerate(entry.exports[1:]):
        found |= {f"other{number}": other, f"lead{number}": entry.lead(other.model)}
    return found
