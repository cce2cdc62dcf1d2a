"""The belief report: what is printed, the JSON, and one page, `belief.md`, with its table, verdicts and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nextlat_dist.evaluation.belief.data import Histories
from nextlat_dist.evaluation.belief.pictures import geometry_figure, steps_figure
from nextlat_dist.evaluation.belief.rows import FITTED, NUMBERS, OWN, BeliefRow, grouped, judged
from nextlat_dist.evaluation.belief.verdicts import PROPERTIES, verdicts
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.runs import over_runs
from nextlat_dist.reporting.tables import markdown_table, table

COMMAND = "nextlat evaluate belief"
PAGE, STEPS_PICTURE, GEOMETRY_PICTURE = "belief.md", "belief_steps.png", "belief_geometry.png"
NUMBER_COLUMNS = {
    "linear R²": "linear_r2",
    "MLP R²": "mlp_r2",
    "control R²": "linear_r2_shuffled",
    "KL share, worst": "worst_kl_ratio",
    "KL share, step 1": "first_kl_ratio",
    "AUC": "equivalence_auc",
    "transition, worst": "worst_transition_error",
    "step 1": "first_transition_error",
    "other token": "first_counterfactual_error",
    "effective rank": "effective_rank",
}
COLUMNS = {"model": "{model}", "runs": "{runs}", "p_ψ": "{predictor}"} | {
    title: f"{{{name}}}" for title, name in NUMBER_COLUMNS.items()
}


def belief_report(
    options: Mapping[str, Any],
    rows: Sequence[BeliefRow],
    histories: Histories,
    geometry: Mapping[str, np.ndarray],
) -> Report:
    """`geometry`: the beliefs of the second half of the documents, exact and as decoded from each model's first run,
    [rows, states] each.
    """
    about = _about(histories, rows[0].last_token_r2)
    predictors = _predictors(rows)
    sentences = [sentence for name, own in judged(rows).items() for sentence in verdicts(name, own)]
    lines = table_rows(rows)
    return Report(
        command=COMMAND,
        options=options,
        summary=summarise(rows),
        rows=rows,
        extra={
            "process": histories.hmm.parameters,
            "about": about,
            "predictors": predictors,
            "verdicts": sentences,
        },
        text="\n".join([table(COLUMNS, lines), "", about, predictors, *sentences]),
        pictures={STEPS_PICTURE: lambda: steps_figure(rows), GEOMETRY_PICTURE: lambda: geometry_figure(geometry)},
        pages={PAGE: _page(lines, about, predictors, sentences)},
    )


def summarise(rows: Sequence[BeliefRow]) -> dict[str, float]:
    """`{model}_{number}`: mean over runs, with `_sd` where there are several; `{model}_{property}`: share of runs in
    which it holds. For a model with an own p_ψ, what was measured with a fitted one has `_fitted` after the model.
    """
    summary: dict[str, float] = {}
    chosen = judged(rows)
    for (name, predictor), own in grouped(rows).items():
        prefix = f"{name}_fitted" if (chosen[name][0].predictor, predictor) == (OWN, FITTED) else name
        for number in NUMBERS:
            values = [getattr(row, number) for row in own]
            if None not in values:
                over = over_runs(values)
                summary[f"{prefix}_{number}"] = over.mean
                if over.deviation is not None:
                    summary[f"{prefix}_{number}_sd"] = over.deviation
        for entry in PROPERTIES:
            held = [entry.holds(row) for row in own]
            if None not in held:
                summary[f"{prefix}_{entry.name}"] = over_runs(bool(value) for value in held).mean
    return summary


def table_rows(rows: Sequence[BeliefRow]) -> list[dict[str, Any]]:
    """A line per model and kind of p_ψ: mean ± standard deviation over its runs."""
    lines = []
    for (model, predictor), own in grouped(rows).items():
        line: dict[str, Any] = {"model": model, "predictor": predictor, "runs": len(own)}
        for name in NUMBER_COLUMNS.values():
            values = [value for row in own if (value := getattr(row, name)) is not None]
            line[name] = over_runs(values).with_deviation() if values else None
        lines.append(line)
    return lines


def _page(lines: Sequence[Mapping[str, Any]], about: str, predictors: str, sentences: Sequence[str]) -> str:
    return "\n".join(
        [
            "# Did the latents become belief states?",
            "",
            about,
            "",
            markdown_table(COLUMNS, lines),
            "",
            predictors,
            "",
            "## Verdicts",
            "",
            *(f"- {sentence}" for sentence in sentences),
            "",
            "## Thresholds",
            "",
            *(f"- **{p.name}** {'≥' if p.at_least else '≤'} {p.threshold:g}: {p.reason}." for p in PROPERTIES),
            "",
            f"![by step]({STEPS_PICTURE})",
            "",
            f"![beliefs]({GEOMETRY_PICTURE})",
            "",
        ]
    )


def _about(histories: Histories, floor: float) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in histories.hmm.parameters.items())
    return (
        f"Process: {parameters}; {len(histories.tokens)} documents that no model was trained on, {histories.steps} "
        f"steps ahead. The last token alone explains R² {floor:.3f} of the belief."
    )


def _predictors(rows: Sequence[BeliefRow]) -> str:
    kinds = {row.predictor for row in rows}
    words = []
    if OWN in kinds:
        words.append("p_ψ own: the latent predictor trained with the model; the verdicts are about it.")
    if FITTED in kinds:
        words.append(
            "p_ψ fitted: one of the same architecture, fitted afterwards to frozen states of training documents; a "
            "model without its own is judged by it."
        )
    return " ".join(words)
