"""Values of a manifest that anybody may have written: of the types and in the ranges that it must have.

Invariant: what is wrong is a ValueError that names the value; nothing of it is opened or reckoned with before.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal, TypeVar

from nextlat_dist.reporting.console import printable

T = TypeVar("T")
# Sums of counts, and what they are multiplied with, stay in 64 bits.
MAX_COUNT = 1 << 56
_SHOWN = 60
_REMARKS = ("empty", "binary", "utf16", "bad_line", "without", "invalid_utf8", "not_lossless", "cut", "long")


def typed(cls: type[T], raw: Any, name: str) -> T:
    """The dataclass `cls` (fields of int, str, bool, None and Literal) from a JSON object.

    Raises:
        ValueError: it is no object with these fields, or a field has another type; numbers are -1 or more.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{name} is {shown(raw)}, not an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = [key for key in raw if key not in fields]
    if unknown:
        raise ValueError(f"{name} has the unknown field {shown(unknown[0])}")
    types = typing.get_type_hints(cls)
    for key, field in fields.items():
        if key in raw:
            _check(raw[key], types[key], f"{name}.{key}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{name} has no {key}")
    return cls(**raw)


def checked(value: Any, kind: Any, name: str) -> Any:
    """The value. Raises ValueError when it is not of that type."""
    _check(value, kind, name)
    return value


def _check(value: Any, kind: Any, name: str) -> None:
    allowed = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        if value not in allowed or isinstance(value, bool):
            raise ValueError(f"{name} is {shown(value)}, not one of {', '.join(allowed)}")
        return
    # bool is a kind of int, but true is no number; types are compared as they are.
    if type(value) not in (allowed or (kind,)):
        wanted = " or ".join(each.__name__ for each in allowed or (kind,))
        raise ValueError(f"{name} is {shown(value)}, not of type {wanted}")
    if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value <= MAX_COUNT:
        raise ValueError(f"{name} is {shown(value)}, not a count")


def check_file_name(value: str, name: str, *, anywhere: bool) -> None:
    """A name of a file: in the folder of the dataset or below, or with `anywhere` a full path or a URL too.

    Raises:
        ValueError: it is something else.
    """
    if not value or any(character < " " or character == "\x7f" for character in value):
        raise ValueError(f"{name} is {shown(value)}, which is not the name of a file")
    is_outside = "://" in value or value.startswith(("/", "~")) or ".." in value.split("/")
    if is_outside and not anywhere:
        raise ValueError(f"{name} is {shown(value)}, which lies outside the folder of the dataset")


def check_report(report: dict[str, Any]) -> None:
    """The parts of a report that commands print or reckon with. Raises ValueError for what they could not."""
    for remark in _REMARKS:
        if remark in report:
            _check_list(report[remark], f"report.{remark}")
    if "on_invalid" in report:
        _check(report["on_invalid"], str, "report.on_invalid")
    for number, tar in enumerate(checked(report.get("tars", []), list, "report.tars")):
        name = f"report.tars[{number}]"
        if not isinstance(tar, dict) or not isinstance(tar.get("entry"), dict):
            raise ValueError(f"{name} is {shown(tar)}, not the description of a tar")
        _check(tar["entry"].get("name"), str, f"{name}.entry.name")
        for key in ("empty", "without"):
            if key == "empty" or key in tar:
                _check_list(tar.get(key), f"{name}.{key}")


def _check_list(value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}, not an object")
    _check(value.get("count"), int, f"{name}.count")
    for each in checked(value.get("names"), list, f"{name}.names"):
        _check(each, str, f"{name}.names")


def shown(value: Any) -> str:
    """A value for a sentence: short, and without control characters."""
    text = printable(repr(value), keep="")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
