"""A YAML file, or a mapping read from one, as a dataclass: nested sections, lists, mappings, literals.

One reader for run configurations, grids of experiments and whatever else is a dataclass. A file holds only what differs
from the defaults. An unknown key is an error that names the nearest known one; a value of the wrong type is an error
that names the type. Overrides are `section.key=value`, the value read as YAML. The type of its key decides what an
unquoted value is (yaml_text.py); a whole number is the one that is written, never rounded by way of a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from nextlat_dist.config.keys import keys_of, shown, walk
from nextlat_dist.config.yaml_text import Plain, YamlError, leading_zero, parse, plain
from nextlat_dist.errors import UserError
from nextlat_dist.reporting.number_text import LEADING_ZERO, MOST_DIGITS, number_of

Section = TypeVar("Section")

LARGEST_FILE = 1 << 18  # bytes; the shipped configurations have at most a few thousand
_OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_yaml(path: Path, what: str = "config", flag: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Args:
        flag: the option or key that named the file, for messages.

    Raises:
        UserError: unreadable, too large, no YAML, a key given twice, something other than a mapping.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {what} {path}: {cause}; give {flag} an existing YAML file") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} is larger than {LARGEST_FILE:,} bytes, which no {what} is; give {flag} a YAML file")
    if content[:2] in _OTHER_ENCODINGS:
        raise UserError(f"{path} is {_OTHER_ENCODINGS[content[:2]]}, a {what} must be UTF-8; save it as UTF-8")
    try:
        raw = parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: byte {error.start:,} is not UTF-8; save it as UTF-8") from None
    except YamlError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if raw is None or (isinstance(raw, Plain) and raw.is_null):
        return {}
    if not isinstance(raw, dict):
        kind = "list" if isinstance(raw, list) else "single value"
        raise UserError(f"{path} must hold a mapping of sections, it holds a {kind}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a mapping that `build` has not seen yet."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {shown(override)} is not of the form section.key=value")
    try:
        value = parse(text)
    except YamlError as error:
        raise UserError(
            f"the value of override {shown(override)} is not valid YAML: {error}; a text with such signs needs quotes, "
            f"as in '{key}=\"…\"'"
        ) from None
    if value is None or isinstance(value, Plain):
        value = Plain(text.strip())  # what follows a "#" too: nobody comments on a command line
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        below = node.get(parent)
        if below is None or (isinstance(below, Plain) and below.is_null):
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {shown(override)}: {parent} is a value, not a section")
    node[leaf] = value


def build(cls: type[Section], raw: Any, what: str = "config") -> Section:
    """The dataclass `cls` of a mapping; `what` names the kind of file in errors.

    Raises:
        UserError: an unknown key, a missing one, a value of the wrong type.
    """
    built: Section = _Reader(cls, what).section(cls, raw, "")
    return built


@dataclass(frozen=True)
class _Reader:
    root: type  # unknown keys are looked for in all of it
    what: str

    def section(self, cls: type, raw: Any, prefix: str) -> Any:
        if isinstance(raw, Plain) and raw.is_null and prefix:
            raw = {}
        if not isinstance(raw, dict):
            raise UserError(
                f"{prefix.rstrip('.') or f'the {self.what}'} is a section, it cannot be set to {shown(raw)}"
            )
        keys = keys_of(cls)
        values: dict[str, Any] = {}
        for name, value in raw.items():
            if name not in keys:
                raise UserError(self._unknown_key(f"{prefix}{name}", str(name), prefix, list(keys)))
            inner = keys[name].section
            if inner is not None:
                values[name] = self.section(inner, value if value is not None else {}, f"{prefix}{name}.")
            else:
                values[name] = self._convert(value, keys[name].hint, f"{prefix}{name}")
        for name, key in keys.items():
            if name not in values and key.default is dataclasses.MISSING:
                listed, bracket, _ = prefix.partition("[")
                needs = f"every entry of {listed}" if bracket else prefix.rstrip(".") or f"the {self.what}"
                raise UserError(f"{prefix}{name} is missing; {needs} needs one")
        return cls(**values)

    def _unknown_key(self, full: str, key: str, prefix: str, known: list[str]) -> str:
        everywhere = [name for name, _ in walk(self.root) if "[" not in name]
        same_name = [name for name in everywhere if name.endswith(f".{key}")]
        siblings = [prefix + name for name in difflib.get_close_matches(key, known, n=1)]
        # The right name in the wrong section, else a misspelt name in this section, else whatever comes nearest.
        nearest = [*same_name, *siblings, *difflib.get_close_matches(full, everywhere, n=1, cutoff=0.0)]
        return f"unknown {self.what} key {shown(full)}; the nearest known key is {nearest[0]!r}"

    def _convert(self, value: Any, hint: Any, key: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return self._any(value, key)
        if origin in (Union, types.UnionType):
            return self._convert_union(value, arguments, key)
        if origin is Literal:
            return self._choose(value, arguments, key)
        if origin in (list, tuple, dict):
            return self._convert_collection(value, origin, arguments, key)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            return self.section(hint, value, f"{key}.")
        return _convert_scalar(value, hint, key)

    def _any(self, value: Any, key: str) -> Any:
        try:
            return plain(value)
        except YamlError as error:
            raise UserError(f"{key} is {shown(value)}: {error}") from None

    def _choose(self, value: Any, arguments: tuple[Any, ...], key: str) -> Any:
        """One of the values of a literal type; 1.0 means 1."""
        given = value
        if isinstance(value, Plain):
            given = value.text if isinstance(arguments[0], str) and not value.is_null else value.value
        if isinstance(given, (dict, list, bool)) or given not in arguments:
            raise UserError(f"{key} is {shown(given)}, it must be one of {', '.join(map(str, arguments))}")
        return arguments[arguments.index(given)]

    def _convert_union(self, value: Any, arguments: tuple[Any, ...], key: str) -> Any:
        """Null, or the one other type; of several plain types, whichever the value has."""
        kinds = [kind for kind in arguments if kind is not type(None)]
        if len(kinds) < len(arguments) and (value is None or (isinstance(value, Plain) and value.is_null)):
            return None
        if len(kinds) == 1:
            return self._convert(value, kinds[0], key)
        if isinstance(value, Plain):
            value = value.value if isinstance(value.value, tuple(kinds)) or str not in kinds else value.text
        if not isinstance(value, tuple(kinds)) or isinstance(value, bool):
            names = ", ".join(kind.__name__ for kind in kinds[:-1])
            raise UserError(f"{key} is {shown(value)}, it must be of type {names} or {kinds[-1].__name__}")
        return value

    def _convert_collection(self, value: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> Any:
        if origin is dict:
            value = {} if value is None or (isinstance(value, Plain) and value.is_null) else value
            if not isinstance(value, dict):
                raise UserError(f"{key} is {shown(value)}, it must be a mapping")
            return {str(name): self._convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
        if not isinstance(value, list):
            raise UserError(f"{key} is {shown(value)}, it must be a list")
        return origin(self._convert(item, arguments[0], f"{key}[{number}]") for number, item in enumerate(value))


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    """`value`, as YAML or Python has it, as an int, float, bool or str.

    Raises:
        UserError: it is of another type, not finite, or a text that no file system and no encoding takes.
    """
    if hint is str and isinstance(value, Plain) and not value.is_null:
        value = value.text
    elif isinstance(value, Plain):
        if hint in (int, float) and LEADING_ZERO.fullmatch(value.text):
            raise UserError(f"{key} is {value.text}, {leading_zero(value.text)}")
        # The text of a number is more exact than what YAML makes of it; null and true are none.
        of_text = value.is_null or value.truth is not None or hint is bool
        value = value.value if of_text else value.text
    if hint in (int, float) and isinstance(value, str):
        number = number_of(value)
        if number is None:
            raise UserError(f"{key} is {shown(value)}, it must be a number")
        value = number
    if hint is int and isinstance(value, float) and value.is_integer() and abs(value) < 10**MOST_DIGITS:
        value = int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 10**300 else math.inf
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} is {shown(value)}, it must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value!r}, it must be finite")
    if isinstance(value, str) and ("\0" in value or not _is_encodable(value)):
        raise UserError(f"{key} is {shown(value)}, it must be text without NUL and half characters")
    return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
