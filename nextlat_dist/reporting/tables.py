"""Tables of rows, for the console and for Markdown.

Columns are pairs of a heading and a format, such as `("speedup", "{speedup.value:.2f}")`; a mapping of headings to
formats does, too, where no two headings are the same. A row is a mapping or an object with these fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

Columns = Mapping[str, str] | Sequence[tuple[str, str]]


class _Missing:
    """Stands for None, whatever the format."""

    def __format__(self, spec: str) -> str:
        return "–"


class _FieldsOf(Formatter):
    """Formats the fields of one row; what is None, or would be inside of it, is missing."""

    def __init__(self, row: Any) -> None:
        self.row = row

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        first, *inner = field_name.split(".")
        value = self.row[first] if isinstance(self.row, Mapping) else getattr(self.row, first)
        for name in inner:
            value = None if value is None else getattr(value, name)
        return (_Missing() if value is None else value), first


def _cells(columns: Columns, rows: Sequence[Any]) -> list[list[str]]:
    pairs = list(columns.items() if isinstance(columns, Mapping) else columns)
    body = ([_FieldsOf(row).format(form) for _, form in pairs] for row in rows)
    return [[heading for heading, _ in pairs], *body]


def table(columns: Columns, rows: Sequence[Any]) -> str:
    """Aligned lines; a field that is None is shown as –."""
    cells = _cells(columns, rows)
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells)


def markdown_table(columns: Columns, rows: Sequence[Any]) -> str:
    """The same in Markdown."""
    heading, *body = ("| " + " | ".join(line) + " |" for line in _cells(columns, rows))
    return "\n".join([heading, "|" + "---:|" * len(columns), *body])
