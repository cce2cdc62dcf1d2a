"""Findings of the doctor, and commands that it finds."""

from __future__ import annotations

from pathlib import Path

from nextlat_dist.doctor.findings import Finding


def assert_problem(finding: Finding, *parts: str) -> None:
    assert finding.level == "problem", finding
    for part in parts:
        assert part in finding.text


def add_command(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
