"""The report of one run: training curve, export check and speculative decoding, merged.

    merge_run(run_dir: Path) -> RunReport

Reads what the other commands left in the run's directory: `metrics.jsonl` of training, `export/export_report.json`, and
`speculative.json` of `nextlat evaluate speculative` with its pictures. What a run does not have (no predictor, no
validation) is absent or null, never invented.

Command: `nextlat report --run DIR`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.evaluation.run_report.page import LAST_ENTRIES, SECONDS, markdown
from nextlat_dist.files import EXPORT_FOLDER, EXPORT_REPORT_FILE, METRICS_FILE, SPECULATIVE_REPORT_FILE
from nextlat_dist.huggingface.stored import read_fields

HEADLINE_FIELDS = (  # of greedy text, and as `sampled_…` of the highest temperature: a draft length for each
    "draft_length",
    "accepted_tokens_per_cycle",
    "speedup",
    "speedup_low",
    "speedup_high",
    "speedup_in_sample",
    "speedup_adaptive",
    "speedup_adaptive_low",
    "speedup_adaptive_high",
)
SPECULATIVE_FIELDS = (
    "greedy_identical",
    *HEADLINE_FIELDS,
    *(f"sampled_{name}" for name in HEADLINE_FIELDS),
    "repeated_4gram_share",
    "prompts",
)


@dataclass(frozen=True)
class RunReport:
    """Attributes:
    content: of `report.json`.
    page: `report.md`.
    entries: the lines of `metrics.jsonl`, for the picture of the loss terms.
    """

    content: Mapping[str, Any]
    page: str
    entries: Sequence[Mapping[str, Any]]


def merge_run(run_dir: Path) -> RunReport:
    """Merge the run's measurements.

    `loss_first` is the first logged loss, `loss_last` the mean of the last five; `tokens_per_second` is the median of
    the logged rates. Only the training metrics have to be there.

    Raises:
        UserError: no metrics, or a line of them that is cut short.
    """
    entries = _read_metrics(run_dir / METRICS_FILE)
    content: dict[str, Any] = {"train": _train_summary(run_dir / METRICS_FILE, entries)}
    exported = run_dir / EXPORT_FOLDER / EXPORT_REPORT_FILE
    if os.path.isfile(exported):
        difference = read_fields(exported, "export the run again").number("max_logit_difference", default=None)
        content["export"] = {"max_logit_difference": difference}
    measured = _read_measured(run_dir / SPECULATIVE_REPORT_FILE)
    if measured is not None:
        summary = measured["summary"]
        content["speculative"] = {
            name: summary[name] for name in SPECULATIVE_FIELDS if name in summary and _is_held_out(name, summary)
        }
        content |= {"machine": measured["machine"], "versions": measured["versions"]}
    return RunReport(content, markdown(run_dir, content, measured), entries)


def _train_summary(path: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    logged = [entry for entry in entries if entry.get("loss") is not None]
    if not logged and any("loss" in entry for entry in entries):
        raise UserError(f"{path} holds no step with a training target: nothing was trained; look at the data's prompts")
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
        **_resources(logged),
        **_left_out(entries),
    }


def _resources(logged: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the logged lines: MFU, the share of time of each part of a step; and the largest peak of memory.

    The first line is left out where there are others: a first step makes what later ones find.
    """
    lines = logged[1:] or logged
    found: dict[str, Any] = {}
    shares = [_shares(line) for line in lines if any(name.startswith(SECONDS) for name in line)]
    if shares:
        found["time_split"] = {name: median(share[name] for share in shares) for name in shares[0]}
    utilisation = [line["mfu"] for line in lines if line.get("mfu") is not None]
    if utilisation:
        found["mfu"] = median(utilisation)
    peaks = [peak for line in logged for peak in line.get("peak_memory_gigabytes", [])]
    return {**found, **({"peak_memory_gigabytes": max(peaks)} if peaks else {})}


def _shares(line: Mapping[str, Any]) -> dict[str, float]:
    seconds = {name.removeprefix(SECONDS): value for name, value in line.items() if name.startswith(SECONDS)}
    whole = sum(seconds.values()) or 1.0
    return {name: value / whole for name, value in seconds.items()}


def _left_out(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What of the data the weights never saw, where there was such: steps without targets, documents cut short."""
    without = sum(entry.get("steps_without_targets", 0) for entry in entries)
    return {**({"steps_without_targets": without} if without else {}), **_cut_short(entries)}


def _cut_short(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all lines: a warning counts from the last start of the run on, and a killed run has none at its end."""
    lines = [entry for entry in entries if entry.get("documents")]
    cut, documents, cut_tokens, tokens = (
        sum(entry[key] for entry in lines) for key in ("cut_documents", "documents", "cut_tokens", "document_tokens")
    )
    if cut:
        shares = {"cut_documents_share": cut / documents, "cut_tokens_share": cut_tokens / max(tokens, 1)}
        return {"cut_documents": cut, **shares}
    warned = [entry["warning"] for entry in entries if "cut_documents_share" in entry.get("warning", {})]
    keys = ("cut_documents", "cut_documents_share", "cut_tokens_share")
    return {key: warned[-1][key] for key in keys} if warned and not lines else {}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; give the output directory of a training run")
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}, is cut short or no JSON object; remove that line")
        entries.append(entry)
    return entries


def _read_measured(path: Path) -> dict[str, Any] | None:
    if not os.path.isfile(path):
        return None
    fields = read_fields(path, "run `nextlat evaluate speculative` again")
    for key in ("summary", "options", "machine", "versions"):
        fields.object(key)
    for key in ("rows", "cells", "verdicts", "costs"):
        fields.list(key)
    return dict(fields.values)


def _is_held_out(name: str, summary: Mapping[str, Any]) -> bool:
    """Whether it is what the name says: earlier releases gave the speedup of the length that was the best in sight."""
    prefix = "sampled_" if name.startswith("sampled_") else ""
    picked = name.removeprefix(prefix) in ("speedup", "speedup_low", "speedup_high")
    return not picked or f"{prefix}speedup_in_sample" in summary
