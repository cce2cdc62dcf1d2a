"""The findings of checks, and how they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        level: `problem` stops a start; `note` is worth knowing.
        text: for a problem one sentence with the values, the rule and what to change.
    """

    check: str
    level: Literal["ok", "note", "problem"]
    text: str


def ok(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def note(check: str, text: str) -> Finding:
    return Finding(check, "note", text)


def problem(check: str, text: str) -> Finding:
    return Finding(check, "problem", text)


def table(findings: Sequence[Finding]) -> str:
    """A line per finding: level, check, sentence."""
    width = max((len(finding.check) for finding in findings), default=0)
    shown = {"ok": "OK", "note": "note", "problem": "PROBLEM"}
    return "\n".join(f"{shown[f.level]:8} {f.check:{width}}  {f.text}" for f in findings)


def problems(findings: Sequence[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.level == "problem"]


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """`summary` counts findings by level; `rows` are the findings."""
    levels = [finding.level for finding in findings]
    return {
        "command": "nextlat doctor",
        "summary": {level: levels.count(level) for level in ("ok", "note", "problem")},
        "rows": [asdict(finding) for finding in findings],
    }
