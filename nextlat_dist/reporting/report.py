"""A report: what a measuring command found, as a value; `publish` shows and writes it.

It names the machine and the versions it was measured with, and no host, user or path: it can be committed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextlat_dist.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORTED_PACKAGES = ("nextlat-dist", "torch", "transformers", "numpy", "webdataset", "sentencepiece")


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, torch threads and GPUs."""
    import torch

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


def versions(*further: str) -> dict[str, str]:
    """Of Python, of the packages that every report names where they are installed, and of further ones."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {package: importlib.metadata.version(package) for package in further}


@dataclass(frozen=True)
class Report:
    """Attributes:
    command: as it is typed, without its options.
    options: what it was asked for.
    summary: flat, name → number.
    rows: one for each thing measured: mappings, or records that have `to_json` or are dataclasses.
    extra: further keys of the JSON.
    text: what a person reads: tables and sentences.
    remarks: what is said on stderr after the text, such as what is missing.
    pictures: file name → draws the figure; called only where pictures are wanted.
    pages: file name → text, written next to the pictures.
    machine: what it was measured on.
    """

    command: str
    options: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Any]
    extra: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    remarks: Sequence[str] = ()
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    pages: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=machine)

    def __post_init__(self) -> None:
        nested = [name for name, value in self.summary.items() if not isinstance(value, (int, float))]
        assert not nested, f"the summary must be flat numbers: {nested}"

    def content(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "command": self.command,
            "options": dict(self.options),
            "machine": dict(self.machine),
            "versions": versions(),
            "summary": dict(self.summary),
            "rows": [_as_json(row) for row in self.rows],
            **self.extra,
        }


def _as_json(row: Any) -> dict[str, Any]:
    if hasattr(row, "to_json"):
        return dict(row.to_json())
    return asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
