"""The report of one run: training curve, export check and speculative decoding on one page.

    write_run_report(run_dir: Path) -> dict

Reads what the other commands left in the run's directory: `metrics.jsonl` of training, `export/export_report.json`, and
`speculative.json` of `nextlat evaluate speculative` with its pictures. Writes `report.json`, `report.md` and
`loss_terms.png` beside them. What a run does not have (no predictor, no validation) is absent or null, never invented.

Command: `nextlat report --run DIR`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.run_report.page import LAST_ENTRIES, markdown
from nextlat_dist.reporting import pictures, report

METRICS_FILE = "metrics.jsonl"
EXPORT_REPORT = Path("export") / "export_report.json"
SPECULATIVE_REPORT = "speculative.json"
LOSS_TERMS = {"loss": "total", "next_token": "next token", "hidden": "hidden state", "kl": "KL", "mtp": "multi-token"}
SPECULATIVE_FIELDS = (
    "greedy_identical",
    "draft_length",
    "accepted_tokens_per_cycle",
    "speedup",
    "sampled_accepted_tokens_per_cycle",
    "sampled_speedup",
    "speedup_adaptive",
    "sampled_speedup_adaptive",
    "repeated_4gram_share",
    "prompts",
)


def write_run_report(run_dir: Path) -> dict[str, Any]:
    """Merge the run's measurements; returns the content of `report.json`.

    `loss_first` is the first logged loss, `loss_last` the mean of the last five; `tokens_per_second` is the median of
    the logged rates. Only the training metrics have to be there.

    Raises:
        UserError: no metrics, or a line of them that is cut short.
    """
    entries = _read_metrics(run_dir / METRICS_FILE)
    content: dict[str, Any] = {"train": _train_summary(run_dir / METRICS_FILE, entries)}
    exported = _read_json(run_dir / EXPORT_REPORT)
    if exported is not None:
        content["export"] = {"max_logit_difference": exported.get("max_logit_difference")}
    measured = _read_json(run_dir / SPECULATIVE_REPORT)
    if measured is not None:
        summary = measured["summary"]
        content["speculative"] = {name: summary[name] for name in SPECULATIVE_FIELDS if name in summary}
        content |= {"machine": measured["machine"], "versions": measured["versions"]}
    draw_loss_terms(entries, run_dir / "loss_terms.png")
    report.write_json(run_dir / "report.json", content)
    (run_dir / "report.md").write_text(markdown(run_dir, content, measured))
    return content


def draw_loss_terms(entries: list[dict[str, Any]], path: Path) -> None:
    """One panel per loss term that the run logged, over tokens; validation as dots in the panel of the same term."""
    terms = [term for term in LOSS_TERMS if any(term in entry for entry in entries)]
    figure, axes = pictures.panels(len(terms), "Loss terms over training tokens")
    for index, (term, axis) in enumerate(zip(terms, axes, strict=True)):
        for name, style in ((term, {"linewidth": 1.3}), (f"validation_{term}", {"marker": "o", "linestyle": "none"})):
            points = [(entry["tokens"] / 1e6, entry[name]) for entry in entries if entry.get(name) is not None]
            if points:
                label = "validation" if name != term else "training"
                axis.plot(*zip(*points, strict=True), color=pictures.COLORS[index], label=label, **style)
        axis.set(title=LOSS_TERMS[term], xlabel="tokens (millions)", ylabel="loss")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.legend(frameon=False)
    pictures.save_picture(figure, path)


def _train_summary(path: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    logged = [entry for entry in entries if "loss" in entry]
    if not logged:
        raise UserError(f"{path} holds no training step; let the run log at least one (training.log_interval)")
    validation = [entry["validation_loss"] for entry in entries if entry.get("validation_loss") is not None]
    last = [entry["loss"] for entry in logged[-LAST_ENTRIES:]]
    rates = [entry["tokens_per_second"] for entry in logged if entry.get("tokens_per_second")]
    return {
        "loss_first": logged[0]["loss"],
        "loss_last": sum(last) / len(last),
        "validation_loss": validation[-1] if validation else None,
        "tokens": logged[-1]["tokens"],
        "tokens_per_second": sorted(rates)[len(rates) // 2] if rates else None,
    }


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the output directory of a training run")
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, is cut short or no JSON; remove that line") from error
    return entries


def _read_json(path: Path) -> dict[str, Any] | None:
    content: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return content
