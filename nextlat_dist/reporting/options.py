"""Command-line options that several commands have: types of arguments, --json and --pictures, fields of a dataclass.

argparse makes a sentence of the error of a type, and names the option.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from nextlat_dist.errors import without_secrets
from nextlat_dist.reporting.console import printable, shortened
from nextlat_dist.reporting.number_text import number_of, whole_number_of

LARGEST = 2**63 - 1
MOST_VALUES = 10_000  # of a list such as 1..20


_ADVICE = re.compile(r"(?<=[;,] )((?:or )?(?:change|set|lower|raise)) ([a-z][a-z_]*)\b")


class CommandParser(argparse.ArgumentParser):
    """A parser of a command, and of the commands below it.

    Numbers are written as in a configuration: 1_000, 1e9. Overrides (key=value) may stand before, between and after the
    options. What it refuses is said without control characters and without the secrets of a URL.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, rest = self.parse_known_args(args, namespace)
        if hasattr(options, "overrides"):
            options.overrides = [*options.overrides, *(word for word in rest if not word.startswith("-"))]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options

    def in_flags(self, message: str) -> str:
        """A sentence about a value, with flags of the command line where it says which parameter to change."""
        flags = {flag.lstrip("-").replace("-", "_"): flag for flag in _flags(self)}
        return _ADVICE.sub(lambda found: f"{found[1]} {flags.get(found[2], found[2])}", message)

    def error(self, message: str) -> NoReturn:
        super().error(printable(without_secrets(shortened(message))))


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Those of a parser and of the ones below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _flags(below)
        elif action.option_strings:
            yield action.option_strings[-1]


def whole_number(text: str) -> int:
    value = whole_number_of(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a whole number, such as 1000, 1_000 or 1e9")
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is out of range, it must be at most {LARGEST}")
    return value


def number(text: str) -> float:
    value = number_of(text)
    if value is None or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shortened(text)!r} is not a number, such as 0.5 or 1e-3")
    return float(value)


def integers(text: str) -> list[int]:
    """`0..3,8` -> [0, 1, 2, 3, 8]."""
    values: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        begin, end = whole_number(first), whole_number(last if dots else first)
        if end < begin or len(values) + end - begin >= MOST_VALUES:
            raise argparse.ArgumentTypeError(f"{shortened(part)} must rise and have at most {MOST_VALUES:,} numbers")
        values += range(begin, end + 1)
    return values


def numbers(text: str) -> list[float]:
    """`0,0.6,1` -> [0.0, 0.6, 1.0]."""
    return [number(part) for part in text.split(",")]


def add_outputs(parser: argparse.ArgumentParser, *, pictures: str | None = None) -> None:
    """--json and, where `pictures` says what is drawn ("PNGs"), --pictures; `publish` takes both."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here (default: nowhere)")
    if pictures is not None:
        parser.add_argument(
            "--pictures", type=Path, metavar="DIR", help=f"write {pictures} into this directory (default: nowhere)"
        )


def add_fields(
    parser: argparse.ArgumentParser, cls: Any, *, names: Sequence[str] | None = None, defaults: Any = None
) -> None:
    """An option for each field of a dataclass: `draft_length` becomes --draft-length.

    A field without a default is required; a bool is a switch; a tuple takes several values; a Literal has choices.
    The field's metadata may have `help`, `metavar`, `default` (words for the help), `flag` (another name), and `parse`:
    a function of the one text that makes the whole value.

    Args:
        cls: the dataclass.
        names: of the fields that become options; None: all.
        defaults: an instance whose values are shown as the defaults; None: the class's own.
    """
    hints = get_type_hints(cls)
    for parameter in fields(cls):
        if names is None or parameter.name in names:
            default = _default(parameter) if defaults is None else getattr(defaults, parameter.name)
            _add_field(parser, parameter, hints[parameter.name], default)


def given(options: argparse.Namespace, cls: Any) -> dict[str, Any]:
    """The fields of `cls` that were typed; the others keep their defaults."""
    typed = vars(options)
    return {parameter.name: typed[parameter.name] for parameter in fields(cls) if parameter.name in typed}


def _default(parameter: Field[Any]) -> Any:
    return parameter.default if parameter.default_factory is MISSING else parameter.default_factory()


def _add_field(parser: argparse.ArgumentParser, parameter: Field[Any], hint: Any, default: Any) -> None:
    flag = parameter.metadata.get("flag", f"--{parameter.name.replace('_', '-')}")
    about = parameter.metadata.get("help", "")
    if hint is bool:
        assert default is False, f"{flag} is a switch: its field must be False by default"
        parser.add_argument(flag, dest=parameter.name, action="store_true", default=argparse.SUPPRESS, help=about)
        return
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
    parse = parameter.metadata.get("parse")
    several = get_origin(hint) is tuple and parse is None
    kind = get_args(hint)[0] if several else hint
    choices = get_args(kind) if get_origin(kind) is Literal else None
    parser.add_argument(
        flag,
        dest=parameter.name,
        type=parse or (str if choices else kind),
        choices=choices,
        nargs="+" if several else None,
        default=argparse.SUPPRESS,
        required=default is MISSING,
        metavar=None if choices else parameter.metadata.get("metavar", parameter.name.upper()),
        help=about + _shown(default, parameter.metadata),
    )


def _shown(default: Any, metadata: Mapping[str, Any]) -> str:
    """What the help says of a default; `default` in the metadata says it in words."""
    if "default" in metadata:
        return f" (default: {metadata['default']})"
    if default is MISSING or default is None or default == ():
        return ""
    if isinstance(default, (tuple, list)):
        default = ("," if "parse" in metadata else " ").join(
            f"{value:g}" if isinstance(value, float) else str(value) for value in default
        )
    return f" (default: {default})"
