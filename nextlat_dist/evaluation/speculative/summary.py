"""From turns to numbers: rows, the comparison of each cell, and the flat summary.

    rows_of(outcomes) -> list[dict]             one row per cell (domain, batch size, temperature) and contender
    compare(outcomes) -> list[dict]             one entry per cell: baseline, best fixed length, adaptive, rivals
    summarise(cells) -> dict                    the same, flat: `code_b1_t0_speedup_adaptive`, `mtp_code_b1_t0_…`

Invariant: nothing is measured here, and every ratio is taken within turns (`paired`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nextlat_dist.evaluation.speculative.paired_statistics import best_of, estimate
from nextlat_dist.evaluation.speculative.trials import (
    ALL,
    HUGGING_FACE,
    NEXTLAT,
    RIVAL,
    Cell,
    Contender,
    Outcome,
    added,
)

NEVER_SLOWER = 0.98  # of the baseline: what adaptive drafting may cost where drafting does not pay
CELL_KEYS = ("domain", "batch_size", "temperature")
CLAIMS = {
    "adaptive_keeps_up": "adaptive_over_fixed_best",
    "adaptive_never_slower": "speedup_adaptive",
    "nextlat_ahead_of_mtp": "nextlat_over_mtp",
}  # verdict of a cell → the ratio it is about
CLOCKS = ("", "cpu_")  # how names of numbers by wall-clock and by processor time begin
HEADLINE_FIELDS = (
    "draft_length",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_with_prefill",
    "accepted_tokens_per_cycle",
    "tokens_per_cycle",
)
Outcomes = Mapping[Contender, Sequence[Outcome]]


def rows_of(cells: Mapping[Cell, Outcomes]) -> list[dict[str, Any]]:
    """Speedups are over draft length 0 of the same model; Hugging Face's over that of NextLat."""
    return [
        _row(cell, contender, turns, outcomes[Contender(_base_model(contender.model), 0)])
        for cell, outcomes in cells.items()
        for contender, turns in outcomes.items()
    ]


def _row(cell: Cell, contender: Contender, turns: Sequence[Outcome], baseline: Sequence[Outcome]) -> dict[str, Any]:
    rates = _rates(turns)
    with_prefill = np.array([turn.rate_with_prefill for turn in turns])
    baseline_with_prefill = np.array([turn.rate_with_prefill for turn in baseline])
    drafted = added([turn.drafted_by_position for turn in turns])
    accepted = added([turn.accepted_by_position for turn in turns])
    tokens_per_cycle = _tokens_per_cycle(turns)
    return {
        "model": contender.model,
        "domain": cell.domain,
        "batch_size": cell.batch_size,
        "temperature": cell.temperature,
        "draft_length": contender.draft_length,
        "turns": len(turns),
        "tokens": sum(turn.tokens for turn in turns),
        **estimate(rates).named("tokens_per_second"),
        **estimate(rates / _rates(baseline)).named("speedup"),
        **_processor_time(turns, baseline),
        "tokens_per_second_with_prefill": float(np.median(with_prefill)),
        "speedup_with_prefill": float(np.median(with_prefill / baseline_with_prefill)),
        "prefill_seconds": float(np.median([turn.prefill_seconds for turn in turns])),
        "cycles": sum(turn.cycles for turn in turns),
        # EOS is ignored and no draft goes beyond the last token, so a cycle writes what it accepts and one more.
        "accepted_tokens_per_cycle": tokens_per_cycle - 1,
        "tokens_per_cycle": tokens_per_cycle,
        # Of the cycles that drafted so far, the share that accepted this position too.
        "acceptance_by_position": [a / d for a, d in zip(accepted, drafted, strict=True) if d],
        "drafted_by_position": drafted,
        "greedy_differing": sum(turn.differing for turn in turns) if cell.temperature == 0 else None,
        "repeated_4gram_share": sum(turn.repeated_share for turn in turns) / len(turns),
    }


def _processor_time(turns: Sequence[Outcome], baseline: Sequence[Outcome]) -> dict[str, Any]:
    if not _on_cpu(turns):
        return {}
    rates = _cpu_rates(turns)
    return {
        "tokens_per_cpu_second": float(np.median(rates)),
        "cpu_speedup": estimate(rates / _cpu_rates(baseline)).value,
    }


def compare(cells: Mapping[Cell, Outcomes]) -> list[dict[str, Any]]:
    """Per cell the contenders side by side; what was not measured is not there. The rival's names begin with `mtp_`.

    Names that begin with `cpu_` are the same by processor time, for a machine that is busy with other work, too.
    """
    compared = []
    for cell, outcomes in cells.items():
        entry: dict[str, Any] = {key: getattr(cell, key) for key in CELL_KEYS}
        for contender, turns in outcomes.items():
            if contender == Contender(NEXTLAT, 0) or contender == Contender(RIVAL, 0):
                prefix = "" if contender.model == NEXTLAT else f"{RIVAL}_"
                own = {c.draft_length: done for c, done in outcomes.items() if c.model == contender.model}
                entry |= {prefix + name: value for name, value in _compare_model(own).items()}
            elif contender.model == HUGGING_FACE:
                name = HUGGING_FACE + ("_prompt_lookup" if contender.draft_length == "prompt_lookup" else "")
                entry[f"{name}_tokens_per_second"] = estimate(_rates(turns)).value
                entry |= estimate(_rates(turns) / _rates(outcomes[Contender(NEXTLAT, 0)])).named(
                    f"{name}_over_baseline"
                )
        compared.append(entry | _ahead_of_rival(outcomes))
    return compared


def _compare_model(own: Mapping[Any, Sequence[Outcome]]) -> dict[str, Any]:
    """One model by draft length: speeds by the clock and by processor time, and tokens per cycle."""
    found: dict[str, Any] = estimate(_rates(own[0])).named("baseline_tokens_per_second")
    found |= _adaptive_and_fixed({length: _rates(turns) for length, turns in own.items()}, _halves(own[0]))
    if _on_cpu(own[0]):
        by_processor = {length: _cpu_rates(turns) for length, turns in own.items()}
        found |= {f"cpu_{name}": value for name, value in _adaptive_and_fixed(by_processor, _halves(own[0])).items()}
    if "draft_length_fixed_best" in found:
        found["accepted_fixed_best"] = _tokens_per_cycle(own[found["draft_length_fixed_best"]]) - 1
    if "adaptive" in own:
        found["accepted_adaptive"] = _tokens_per_cycle(own["adaptive"]) - 1
        found["drafted_adaptive"] = _drafted_per_cycle(own["adaptive"])
    return found


def _adaptive_and_fixed(rates: Mapping[Any, np.ndarray], halves: np.ndarray) -> dict[str, Any]:
    """Rates by draft length, [turns] each → best fixed length, adaptive, and the two against each other."""
    found: dict[str, Any] = {}
    baseline = rates[0]
    fixed = {length: rates[length] for length in rates if length not in (0, "adaptive")}
    best = best_of(fixed, baseline, halves) if fixed else None
    if best is not None:
        found["draft_length_fixed_best"] = best.side
        found |= estimate(best.rates / baseline).named("speedup_fixed_best")
        found["speedup_fixed_best_in_sample"] = estimate(best.in_sample / baseline).value
    if "adaptive" in rates:
        adaptive = estimate(rates["adaptive"] / baseline)
        found |= adaptive.named("speedup_adaptive")
        found["adaptive_never_slower"] = adaptive.value >= NEVER_SLOWER
        if best is not None:
            ratio = estimate(rates["adaptive"] / best.rates)
            found |= ratio.named("adaptive_over_fixed_best")
            found |= estimate(rates["adaptive"] / best.in_sample).named("adaptive_over_fixed_best_in_sample")
            found["adaptive_keeps_up"] = ratio.high >= 1
    return found


def _ahead_of_rival(outcomes: Outcomes) -> dict[str, Any]:
    """Tokens per second over the rival's: each model at its best way of drafting, cross-fitted alike."""
    found: dict[str, Any] = {}
    clocks = {"": _rates} | ({"cpu_": _cpu_rates} if _on_cpu(outcomes[Contender(NEXTLAT, 0)]) else {})
    for clock, rates_of in clocks.items():
        best = {}
        for model in (NEXTLAT, RIVAL):
            own = {c.draft_length: rates_of(turns) for c, turns in outcomes.items() if c.model == model}
            drafting = {length: rates for length, rates in own.items() if length != 0}
            if not drafting:
                return {}
            best[model] = best_of(drafting, own[0], _halves(outcomes[Contender(model, 0)])).rates
        ratio = estimate(best[NEXTLAT] / best[RIVAL])
        found |= ratio.named(f"{clock}nextlat_over_mtp")
        found[f"{clock}nextlat_ahead_of_mtp"] = ratio.low > 1
    return found


def summarise(compared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cells' numbers by flat names, and whether the two claims about adaptive drafting hold everywhere.

    `adaptive_keeps_up`: in every domain, batch size and temperature the interval of adaptive over the best fixed length
    (cross-fitted) reaches 1. `adaptive_never_slower`: everywhere the median of adaptive is ≥ 0.98 of the baseline.
    """
    summary: dict[str, Any] = {}
    for entry in compared:
        prefix = Cell(*(entry[key] for key in CELL_KEYS)).prefix
        for name, value in entry.items():
            if name.startswith(f"{RIVAL}_"):
                summary[f"{RIVAL}_{prefix}{name.removeprefix(f'{RIVAL}_')}"] = value
            elif name not in CELL_KEYS:
                summary[prefix + name] = value
    for clock in CLOCKS:
        for claim in CLAIMS:
            found = [entry[clock + claim] for entry in cells_with(clock + claim, compared)]
            if found:
                summary[clock + claim] = all(found)
    return summary


def headline(compared: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers by plain name, of all domains at the smallest batch: greedy, and the last temperature as `sampled_…`."""
    found: dict[str, Any] = {}
    batch_size = min(entry["batch_size"] for entry in compared)
    temperatures = sorted({entry["temperature"] for entry in compared})
    for temperature in {temperatures[0], temperatures[-1]}:
        where = {"domain": ALL, "batch_size": batch_size, "temperature": temperature}
        prefix = "sampled_" if temperature else ""
        (entry,) = (e for e in compared if where.items() <= e.items())
        for row in rows:
            if row["model"] == NEXTLAT and where.items() <= row.items():
                if row["draft_length"] == 0:
                    found[prefix + "baseline_tokens_per_second"] = row["tokens_per_second"]
                    found[prefix + "repeated_4gram_share"] = row["repeated_4gram_share"]
                elif row["draft_length"] == entry.get("draft_length_fixed_best"):
                    found |= {prefix + name: row[name] for name in HEADLINE_FIELDS}
                elif row["draft_length"] == "adaptive":
                    found[prefix + "speedup_adaptive"] = row["speedup"]
                    found[prefix + "accepted_adaptive"] = row["accepted_tokens_per_cycle"]
    return found


def cells_with(name: str, compared: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of single domains: the claims are about every one of them."""
    return [entry for entry in compared if name in entry and entry["domain"] != ALL]


def _base_model(model: str) -> str:
    return NEXTLAT if model == HUGGING_FACE else model


def _rates(turns: Sequence[Outcome]) -> np.ndarray:
    return np.array([turn.rate for turn in turns])


def _on_cpu(turns: Sequence[Outcome]) -> bool:
    return all(turn.cpu_seconds is not None for turn in turns)


def _cpu_rates(turns: Sequence[Outcome]) -> np.ndarray:
    """Later tokens per second that the machine gave to this process."""
    return np.array([turn.later_tokens / turn.cpu_seconds for turn in turns if turn.cpu_seconds is not None])


def _halves(turns: Sequence[Outcome]) -> np.ndarray:
    return np.array([turn.half for turn in turns])


def _tokens_per_cycle(turns: Sequence[Outcome]) -> float:
    return sum(turn.later_tokens for turn in turns) / sum(turn.cycles for turn in turns)


def _drafted_per_cycle(turns: Sequence[Outcome]) -> float:
    return sum(sum(turn.drafted_by_position) for turn in turns) / sum(turn.cycles for turn in turns)
