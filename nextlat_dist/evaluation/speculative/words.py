"""How the speculative report speaks: columns of its table, verdicts and the greedy check in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

from nextlat_dist.evaluation.speculative.summary import CLAIMS, CLOCKS, NEVER_SLOWER, cells_with

CAVEAT = (
    "The greedy text of a small model falls into loops, and a loop is easy to draft: the greedy numbers flatter "
    "acceptance. Read them together with the share of repeated 4-grams and with the numbers at temperature 1."
)
_CLOCK_WORDS = {"": "By the clock", "cpu_": "By processor time"}
_CLAIM_WORDS = {
    "adaptive_keeps_up": "adaptive keeps up with the best fixed draft length, within its confidence interval,",
    "adaptive_never_slower": f"adaptive reaches {NEVER_SLOWER} of plain decoding's speed",
    "nextlat_ahead_of_mtp": "NextLat writes more tokens per second than MTP, beyond its confidence interval,",
}
_CELL_COLUMNS = {"batch": "{batch_size}", "temperature": "{temperature:g}", "domain": "{domain}"}
_OWN_COLUMNS = {
    "tokens/s plain": "{baseline_tokens_per_second:.0f}",
    "best fixed": "{draft_length_fixed_best}",
    "speedup": "{speedup_fixed_best:.2f}",
    "accepted": "{accepted_fixed_best:.2f}",
}
_ADAPTIVE_COLUMNS = {
    "adaptive": "{speedup_adaptive:.2f}",
    "(95%)": "{speedup_adaptive_low:.2f}–{speedup_adaptive_high:.2f}",
    "accepted ": "{accepted_adaptive:.2f}",
    "adaptive/fixed": "{adaptive_over_fixed_best:.3f}",
    "(95%) ": "{adaptive_over_fixed_best_low:.3f}–{adaptive_over_fixed_best_high:.3f}",
}
_RIVAL_COLUMNS = {
    "MTP best fixed": "{mtp_draft_length_fixed_best}",
    "speedup": "{mtp_speedup_fixed_best:.2f}",
    "accepted": "{mtp_accepted_fixed_best:.2f}",
    "adaptive": "{mtp_speedup_adaptive:.2f}",
    "NextLat/MTP tokens/s": "{nextlat_over_mtp:.2f}",
    "(95%)": "{nextlat_over_mtp_low:.2f}–{nextlat_over_mtp_high:.2f}",
}
_HUGGING_FACE_COLUMNS = {
    "transformers/plain": "{hugging_face_over_baseline:.2f}",
    "with prompt lookup": "{hugging_face_prompt_lookup_over_baseline:.2f}",
}


def verdicts(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence per claim, with the cell that speaks most against it."""
    sentences = []
    for claim, ratio in CLAIMS.items():
        for clock in CLOCKS:
            cells = cells_with(clock + claim, compared)
            if cells:
                worst = min(cells, key=lambda entry: entry[clock + ratio])
                value, low, high = (worst[clock + ratio + end] for end in ("", "_low", "_high"))
                held = sum(entry[clock + claim] for entry in cells)
                where = f"{worst['domain']} at batch {worst['batch_size']}, temperature {worst['temperature']:g}"
                sentences.append(
                    f"{_CLOCK_WORDS[clock]}, {_CLAIM_WORDS[claim]} in {held} of {len(cells)} cells; the lowest ratio "
                    f"is {value:.3f} ({low:.3f}–{high:.3f}), {where}."
                )
    return sentences


def greedy_sentence(summary: Mapping[str, Any]) -> str:
    """Of a summary with a greedy temperature."""
    if summary["greedy_identical"]:
        return "Greedy output is token for token that of plain decoding, for every prompt and draft length."
    return (
        f"{summary['greedy_differences']} greedy continuations differ from plain decoding; where they part, the logits "
        f"of the two tokens lie at most {summary['greedy_largest_logit_gap']:.1e} apart."
    )


def tables(compared: Sequence[Mapping[str, Any]]) -> list[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Columns and rows for `report.table`, by batch size, temperature, domain: our own cells, then those with rivals.

    Only what was measured has columns, and the second table is there only if it has any.
    """

    def measured(name: str) -> list[Mapping[str, Any]]:
        return [entry for entry in compared if name in entry]

    own = _OWN_COLUMNS | (_ADAPTIVE_COLUMNS if measured("speedup_adaptive") else {})
    found = [_table(own, compared)]
    rivals = _RIVAL_COLUMNS if measured("nextlat_over_mtp") else {}
    outside = _HUGGING_FACE_COLUMNS if measured("hugging_face_over_baseline") else {}
    if rivals or outside:
        found.append(_table(rivals | outside, compared if rivals else measured("hugging_face_over_baseline")))
    return found


def _table(
    columns: Mapping[str, str], entries: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    columns = _CELL_COLUMNS | dict(columns)
    nothing = dict.fromkeys(name for form in columns.values() for _, name, _, _ in Formatter().parse(form) if name)
    rows = [nothing | dict(entry) for entry in entries]
    return columns, sorted(rows, key=lambda row: (row["batch_size"], row["temperature"]))
