"""Tables of rows, for the console and for Markdown.

A row is a mapping or a dataclass. A format may reach into a field: `"{speedup.median:.2f}"`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any


class _Missing:
    """Stands for None in a table, whatever the format, and for all that would be inside of it."""

    def __format__(self, spec: str) -> str:
        return "–"

    def __getattr__(self, name: str) -> _Missing:
        return self


def by_name(row: Any) -> dict[str, Any]:
    """The fields of a row."""
    if is_dataclass(row) and not isinstance(row, type):
        return {field.name: getattr(row, field.name) for field in fields(row)}
    return dict(row)


def _cells(columns: Mapping[str, str], rows: Sequence[Any]) -> list[list[str]]:
    shown = [{name: _Missing() if value is None else value for name, value in by_name(row).items()} for row in rows]
    return [list(columns), *([form.format_map(row) for form in columns.values()] for row in shown)]


def table(columns: Mapping[str, str], rows: Sequence[Any]) -> str:
    """Aligned lines; `columns` maps a heading to a format over the fields of a row, such as `"{speedup:.2f}"`."""
    cells = _cells(columns, rows)
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def markdown_table(columns: Mapping[str, str], rows: Sequence[Any]) -> str:
    """The same in Markdown."""
    heading, *body = ("| " + " | ".join(line) + " |" for line in _cells(columns, rows))
    return "\n".join([heading, "|" + "---:|" * len(columns), *body])
