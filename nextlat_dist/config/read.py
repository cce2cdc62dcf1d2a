"""A YAML file, or a mapping read from one, as a dataclass: nested sections, lists, mappings, literals.

One reader for run configurations, grids of experiments and whatever else is a dataclass. A file holds only what differs
from the defaults. An unknown key is an error that names the nearest known one; a value of the wrong type is an error
that names the type. Overrides are `section.key=value`, the value read as YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from nextlat_dist.config.keys import keys_of, walk
from nextlat_dist.errors import UserError

Section = TypeVar("Section")


def read_yaml(path: Path, what: str = "config") -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises UserError."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the {what} {path}: {error.strerror}; give --config an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of sections, it holds a {type(raw).__name__}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a mapping that `build` has not seen yet."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"the value of override {override!r} is not valid YAML") from None
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
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
        if not isinstance(raw, dict):
            raise UserError(f"{prefix.rstrip('.') or f'the {self.what}'} is a section, it cannot be set to {raw!r}")
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
        return f"unknown {self.what} key {full!r}; the nearest known key is {nearest[0]!r}"

    def _convert(self, value: Any, hint: Any, key: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if origin in (Union, types.UnionType):
            return self._convert_union(value, arguments, key)
        if origin is Literal:
            if value not in arguments or isinstance(value, bool):
                raise UserError(f"{key} is {value!r}, it must be one of {', '.join(map(str, arguments))}")
            return arguments[arguments.index(value)]  # 1.0 means 1
        if origin in (list, tuple, dict):
            return self._convert_collection(value, origin, arguments, key)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            return self.section(hint, value, f"{key}.")
        return _convert_scalar(value, hint, key)

    def _convert_union(self, value: Any, arguments: tuple[Any, ...], key: str) -> Any:
        """Null, or the one other type; of several plain types, whichever the value has."""
        kinds = [kind for kind in arguments if kind is not type(None)]
        if value is None and len(kinds) < len(arguments):
            return None
        if len(kinds) == 1:
            return self._convert(value, kinds[0], key)
        if not isinstance(value, tuple(kinds)):
            names = ", ".join(kind.__name__ for kind in kinds[:-1])
            raise UserError(f"{key} is {value!r}, it must be of type {names} or {kinds[-1].__name__}")
        return value

    def _convert_collection(self, value: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> Any:
        if origin is dict:
            value = {} if value is None else value
            if not isinstance(value, dict):
                raise UserError(f"{key} is {value!r}, it must be a mapping")
            return {str(name): self._convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
        if not isinstance(value, list):
            raise UserError(f"{key} is {value!r}, it must be a list")
        return origin(self._convert(item, arguments[0], f"{key}[{number}]") for number, item in enumerate(value))


def _convert_scalar(value: Any, hint: type, key: str) -> Any:
    if hint in (int, float) and isinstance(value, str):
        # YAML 1.1 reads 3e-4 as text; token counts are often written 1e9 or 1_000_000.
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{key} is {value!r}, it must be a number") from None
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} is {value!r}, it must be of type {hint.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value!r}, it must be finite")
    return value
