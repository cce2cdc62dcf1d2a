"""What every measuring command shares: the JSON envelope, the printed table, progress.

A report names the machine and the versions it was measured with, and no host, user or path: it can be committed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

REPORTED_PACKAGES = ("nextlat-dist", "torch", "transformers", "numpy", "webdataset", "sentencepiece")


def envelope(
    command: str, options: Mapping[str, Any], summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The JSON of a measuring command; `summary` is flat, name → number."""
    nested = [name for name, value in summary.items() if not isinstance(value, (int, float))]
    assert not nested, f"the summary must be flat numbers: {nested}"
    return {
        "command": command,
        "options": dict(options),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in REPORTED_PACKAGES},
        "summary": dict(summary),
        "rows": [dict(row) for row in rows],
    }


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, torch threads and GPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


class _Missing:
    """Stands for None in a table, whatever the format."""

    def __format__(self, spec: str) -> str:
        return "–"


def _cells(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    shown = [{name: _Missing() if value is None else value for name, value in row.items()} for row in rows]
    return [list(columns), *([form.format_map(row) for form in columns.values()] for row in shown)]


def table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned lines; `columns` maps a heading to a format over the fields of a row, such as `"{speedup:.2f}"`."""
    cells = _cells(columns, rows)
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def markdown_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown."""
    heading, *body = ("| " + " | ".join(line) + " |" for line in _cells(columns, rows))
    return "\n".join([heading, "|" + "---:|" * len(columns), *body])


class Progress:
    """Lines on stderr, at most one every two seconds: units done, tokens per second so far, time left."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.label, self.total, self.shown = label, total, shown
        self.done = self.tokens = 0
        self.started = self.printed = time.monotonic()

    def add(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now = time.monotonic()
        if self.shown and (now - self.printed >= 2 or self.done == self.total):
            self.printed = now
            elapsed = max(now - self.started, 1e-9)
            left = elapsed / self.done * (self.total - self.done)
            print(
                f"{self.label}: {self.done}/{self.total}, {self.tokens / elapsed:,.0f} tokens/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
