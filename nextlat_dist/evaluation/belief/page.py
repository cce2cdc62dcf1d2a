"""The belief report on one page: `belief.md` with its table and verdicts, `belief_steps.png`, `belief_geometry.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nextlat_dist.evaluation.belief.verdicts import PROPERTIES
from nextlat_dist.reporting import pictures, report

PAGE, STEPS_PICTURE, GEOMETRY_PICTURE = "belief.md", "belief_steps.png", "belief_geometry.png"
COLUMNS = {
    "model": "{model}",
    "runs": "{runs}",
    "p_ψ": "{predictor}",
    "linear R²": "{linear_r2}",
    "MLP R²": "{mlp_r2}",
    "control R²": "{linear_r2_shuffled}",
    "KL share, worst": "{worst_kl_ratio}",
    "KL share, step 1": "{first_kl_ratio}",
    "AUC": "{equivalence_auc}",
    "transition, worst": "{worst_transition_error}",
    "step 1": "{first_transition_error}",
    "other token": "{first_counterfactual_error}",
    "effective rank": "{effective_rank}",
}
CURVES = {
    "kl_ratio": "KL of the future, share of knowing nothing",
    "transition_error": "transition error, tokens that came",
    "counterfactual_error": "transition error, another token first",
}
POINTS = 4000
SMALLEST_SHOWN = 1e-4


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows by model and kind of p_ψ, in order."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["predictor"]), []).append(row)
    return groups


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per model and kind of p_ψ: mean ± standard deviation over its runs."""
    lines = []
    for (model, predictor), own in grouped(rows).items():
        line: dict[str, Any] = {"model": model, "predictor": predictor, "runs": len(own)}
        for name in _number_names(COLUMNS):
            values = [row[name] for row in own if row[name] is not None]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            line[name] = f"{np.mean(values):.3f}{spread}" if values else None
        lines.append(line)
    return lines


def _number_names(columns: Mapping[str, str]) -> list[str]:
    return [name for name in (form[1:-1] for form in columns.values()) if name not in ("model", "runs", "predictor")]


def write_page(content: Mapping[str, Any], geometry: Mapping[str, np.ndarray], directory: Path) -> None:
    """From the content of the JSON; `geometry`: the beliefs of the second half of the documents, exact and as decoded
    from each model's first run, [rows, states] each.
    """
    draw_steps(content["rows"], directory / STEPS_PICTURE)
    draw_geometry(geometry, directory / GEOMETRY_PICTURE)
    lines = [
        "# Did the latents become belief states?",
        "",
        content["about"],
        "",
        report.markdown_table(COLUMNS, table_rows(content["rows"])),
        "",
        content["predictors"],
        "",
        "## Verdicts",
        "",
        *(f"- {sentence}" for sentence in content["verdicts"]),
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
    directory.mkdir(parents=True, exist_ok=True)
    (directory / PAGE).write_text("\n".join(lines))


def draw_steps(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel per curve over rollout steps: mean of the runs, from the lowest to the highest shaded."""
    figure, axes = pictures.panels(len(CURVES), "Rolled out from one state")
    limits = {entry.name: entry.threshold for entry in PROPERTIES}
    for (name, title), axis in zip(CURVES.items(), axes, strict=True):
        for index, ((model, predictor), own) in enumerate(grouped(rows).items()):
            curves = np.array([row[name] for row in own if row[name] is not None])
            if not len(curves):
                continue
            steps = np.arange(1, curves.shape[1] + 1)
            colour = pictures.COLORS[index % len(pictures.COLORS)]
            curves = np.maximum(curves, SMALLEST_SHOWN)
            label = model if predictor == "exact" else f"{model}, p_ψ {predictor}"
            style = ":" if predictor == "exact" else "--" if predictor == "fitted" else "-"
            axis.plot(steps, curves.mean(axis=0), style, color=colour, label=label)
            axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=colour, alpha=0.15)
        if name == "kl_ratio":
            axis.plot(steps, np.maximum(rows[0]["forgetful_ratio"], SMALLEST_SHOWN), color="#999999", label="forgetful")
        axis.axhline(limits["sufficient" if name == "kl_ratio" else "consistent"], color="black", lw=0.8, ls="-.")
        axis.set_yscale("log")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("steps from the state")
    axes[0].legend(fontsize=7)
    pictures.save_picture(figure, path)


def draw_geometry(geometry: Mapping[str, np.ndarray], path: Path) -> None:
    """Beliefs on the two main axes of the exact ones, coloured by the exact belief."""
    exact = next(iter(geometry.values()))
    mean = exact.mean(axis=0)
    axes_of = np.linalg.svd(exact - mean, full_matrices=False)[2][:2]
    colours = np.zeros((len(exact), 3))
    colours[:, : min(3, exact.shape[1])] = exact[:, :3] / np.maximum(exact[:, :3].max(axis=0), 1e-9)
    figure, axes = pictures.panels(len(geometry), "Beliefs, exact and read off the states by a linear map")
    shown = slice(None, POINTS)
    for (name, beliefs), axis in zip(geometry.items(), axes, strict=True):
        x, y = ((beliefs[shown] - mean) @ direction for direction in (axes_of[0], axes_of[-1]))
        axis.scatter(x, y, s=3, c=np.clip(colours[shown], 0, 1), linewidths=0)
        axis.set_title(name, fontsize=10)
    pictures.save_picture(figure, path)
