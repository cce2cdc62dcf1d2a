"""The configuration reference in Markdown, made of the schema.

python -m nextlat_dist.config.reference
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any, Union, get_args, get_origin

import yaml

from nextlat_dist.config.init import choices
from nextlat_dist.config.keys import Key, keys_of
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.reporting.console import say


def reference_markdown() -> str:
    """A table for each section: key, type, default, meaning."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    top = [key for key in keys_of(RunConfig).values() if key.section is None]
    lines += [_row(key) for key in top]
    for name, key in keys_of(RunConfig).items():
        if key.section is not None:
            lines += _section(name, key.section)
    return "\n".join(lines) + "\n"


def _section(name: str, section: type) -> list[str]:
    """The section's table, and those of the lists of sections in it."""
    keys = keys_of(section).values()
    lines = ["", f"## {name}", "", " ".join((section.__doc__ or "").split()), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|", *map(_row, keys)]
    for key in keys:
        for entry in get_args(key.hint):
            if isinstance(entry, type) and dataclasses.is_dataclass(entry):
                lines += _section(f"{name}.{key.name}[]", entry)
    return lines


def _row(key: Key) -> str:
    meaning = key.help
    if key.bounds is not None:
        meaning += f"; must {key.bounds.sentence}"
    default = "(required)" if key.default is dataclasses.MISSING else f"`{_yaml(key.default)}`"
    return "| " + " | ".join((f"`{key.name}`", _type(key.hint), default, meaning.replace("|", "\\|"))) + " |"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if choices(hint):
        return ", ".join(f"`{value}`" for value in choices(hint))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if argument is type(None) else _type(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of {_type(arguments[1])}"
    return "section" if dataclasses.is_dataclass(hint) else str(hint.__name__)


if __name__ == "__main__":
    say(reference_markdown().rstrip())
    sys.exit(0)
