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
from nextlat_dist.evaluation.speculative.step_costs import costs_sentence
from nextlat_dist.evaluation.speculative.trials import ALL, NEXTLAT
from nextlat_dist.evaluation.speculative.words import greedy_sentence, tables
from nextlat_dist.reporting import pictures, report

METRICS_FILE = "metrics.jsonl"
EXPORT_REPORT = Path("export") / "export_report.json"
SPECULATIVE_REPORT = "speculative.json"
LOSS_TERMS = {"loss": "total", "next_token": "next token", "hidden": "hidden state", "kl": "KL", "mtp": "multi-token"}
LAST_ENTRIES = 5
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
ROW_COLUMNS = {
    "batch": "{batch_size}",
    "temperature": "{temperature:g}",
    "draft length": "{draft_length}",
    "tokens/s": "{tokens_per_second:.0f}",
    "speedup": "{speedup:.2f}",
    "(95%)": "{speedup_low:.2f}–{speedup_high:.2f}",
    "with prefill": "{speedup_with_prefill:.2f}",
    "accepted/cycle": "{accepted_tokens_per_cycle:.2f}",
    "tokens/cycle": "{tokens_per_cycle:.2f}",
    "greedy differing": "{greedy_differing}",
    "repeated 4-grams": "{repeated_4gram_share:.2f}",
}


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
    (run_dir / "report.md").write_text(_markdown(run_dir, content, measured))
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


def _markdown(run_dir: Path, content: dict[str, Any], measured: dict[str, Any] | None) -> str:
    train = content["train"]
    validation = "not measured" if train["validation_loss"] is None else f"{train['validation_loss']:.4f}"
    rate = "not logged" if train["tokens_per_second"] is None else f"{train['tokens_per_second']:,.0f}"
    lines = [
        f"# Run `{run_dir.name}`",
        "",
        "## Training",
        "",
        f"Loss {train['loss_first']:.4f} (first logged) → {train['loss_last']:.4f} (mean of the last {LAST_ENTRIES} "
        f"logged); validation loss {validation}. {train['tokens']:,} tokens, median {rate} tokens/s.",
        "",
        "![Loss terms](loss_terms.png)",
        "",
    ]
    if content.get("export", {}).get("max_logit_difference") is not None:
        lines += [
            "## Export",
            "",
            "Largest difference between the logits of the training forward and of `LlamaForCausalLM`: "
            f"{content['export']['max_logit_difference']:.2e}.",
            "",
        ]
    if measured is not None:
        lines += _speculative_markdown(run_dir, measured)
    return "\n".join(lines)


def _speculative_markdown(run_dir: Path, measured: dict[str, Any]) -> list[str]:
    summary, machine = measured["summary"], measured["machine"]
    rows = [row for row in measured["rows"] if row["domain"] == ALL and row["model"] == NEXTLAT]
    lines = ["## Self-speculative decoding", ""]
    if "greedy_identical" in summary:
        lines += [greedy_sentence(summary), "", measured["caveat"], ""]
    lines += [
        f"{summary['prompts']} prompts, {measured['options']['max_new_tokens']} new tokens each, EOS ignored. The "
        "baseline is draft length 0 of the same code, and all contenders take turns on each batch of prompts; a "
        "*speedup* is the median over these turns of the ratio to the baseline within the turn, with its 95% bootstrap "
        "interval. *Accepted* counts drafted tokens per cycle, *tokens/cycle* also the one that costs no draft. Speeds "
        "leave out the prefill. The best fixed length is chosen on one half of the turns and measured on the other.",
        "",
        "\n\n".join(report.markdown_table(*table) for table in tables(measured["cells"])),
        "",
        *([" ".join(measured["verdicts"]), ""] if measured["verdicts"] else []),
        "All domains together, by draft length:",
        "",
        report.markdown_table(ROW_COLUMNS, rows),
        "",
        *(f"Steps of {entry['model']}, {costs_sentence(entry)}." for entry in measured["costs"]),
        "",
    ]
    for name, title in (
        ("acceptance_by_position", "Acceptance by draft position"),
        ("speedup_by_draft_length", "Speedup"),
        ("cost_split", "Where a cycle's time goes"),
    ):
        if (run_dir / f"{name}.png").is_file():
            lines += [f"![{title}]({name}.png)", ""]
    where = ", ".join(
        [machine["cpu"], f"{machine['cores']} cores", f"{machine['torch_threads']} threads", *machine["gpus"]]
    )
    return [*lines, f"Measured on: {where}.", ""]
