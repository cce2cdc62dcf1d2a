"""The page of a run, `report.md`: training, export check and speculative decoding in Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.speculative.comparison import CellComparison
from nextlat_dist.evaluation.speculative.records import ALL, MTP, NEXTLAT
from nextlat_dist.evaluation.speculative.step_costs import costs_sentence
from nextlat_dist.evaluation.speculative.summary import greedy_sentence, tables
from nextlat_dist.reporting.tables import markdown_table

SECONDS = "seconds/"  # before the name of a part of a step, in the metrics
LAST_ENTRIES = 5  # logged steps that the final loss is the mean of
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


def markdown(run_dir: Path, content: dict[str, Any], measured: dict[str, Any] | None) -> str:
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
        *_resources(train),
        *_left_out(train),
        "",
        "![Loss terms](loss_terms.png)",
        "",
        *(["![Time of a step](time_split.png)", ""] if "time_split" in train else []),
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


def _resources(train: dict[str, Any]) -> list[str]:
    """Where the time of a step went, and how much memory it took."""
    split = sorted(train.get("time_split", {}).items(), key=lambda part: -part[1])
    told = [", ".join(f"{name} {share:.0%}" for name, share in split if share >= 0.005)] if split else []
    told = [f"Of a step's time: {told[0]}."] if told else []
    if "mfu" in train:
        told.append(f"MFU {train['mfu']:.1%}.")
    if "peak_memory_gigabytes" in train:
        told.append(f"Peak memory of a rank: {train['peak_memory_gigabytes']:.2f} GB.")
    return ["", " ".join(told)] if told else []


def _left_out(train: dict[str, Any]) -> list[str]:
    lines = []
    if "steps_without_targets" in train:
        lines.append(f"Steps without a training target, not applied: {train['steps_without_targets']:,}.")
    if "cut_documents" in train:
        lines.append(
            f"**Cut by `packing: pad`:** {train['cut_documents']:,} documents ({train['cut_documents_share']:.1%}), "
            f"with {train['cut_tokens_share']:.1%} of all tokens."
        )
    return [text for line in lines for text in ("", line)]


def _speculative_markdown(run_dir: Path, measured: dict[str, Any]) -> list[str]:
    summary, machine = measured["summary"], measured["machine"]
    models = measured.get("models") or _models_before_they_were_named(measured)
    rows = [row for row in measured["rows"] if row["domain"] == ALL and row["model"] == models[0]]
    compared = [CellComparison.from_json(entry, models) for entry in measured["cells"]]
    lines = ["## Self-speculative decoding", ""]
    if "greedy_identical" in summary:
        lines += [greedy_sentence(summary), "", measured["caveat"], ""]
    lines += [
        f"{summary['prompts']} prompts, {measured['options']['max_new_tokens']} new tokens each, EOS ignored. The "
        "baseline is draft length 0 of the same code. A trial runs all methods on one batch of prompts, in an order "
        "that rotates; a *speedup* is the median over trials of the ratio to the baseline within the trial, with its "
        "95% bootstrap interval. *Accepted* counts drafted tokens per cycle, *tokens/cycle* also the one that costs no "
        "draft. Speeds leave out the prefill. The best fixed length is chosen on one half of the trials and measured "
        "on the other.",
        "",
        "\n\n".join(markdown_table(*table) for table in tables(compared)),
        "",
        *([" ".join(measured["verdicts"]), ""] if measured["verdicts"] else []),
        "All domains together, by draft length:",
        "",
        markdown_table(ROW_COLUMNS, rows),
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


def _models_before_they_were_named(measured: dict[str, Any]) -> list[str]:
    """The main export and perhaps a second one, of a file that does not list its exports."""
    return [NEXTLAT, *([MTP] if f"{MTP}_baseline_tokens_per_second" in measured["cells"][0] else [])]
