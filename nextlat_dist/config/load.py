"""YAML plus dotted overrides into a `RunConfig`.

A file holds only what differs from the defaults. An unknown key is an error that names the nearest known one; a value
of the wrong type is an error that names the type. Overrides are `section.key=value`, the value read as YAML.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from nextlat_dist.config.schema import RunConfig, validate
from nextlat_dist.errors import UserError


def load_config(path: Path | None, overrides: list[str] | None = None, world_size: int | None = None) -> RunConfig:
    """Read `path` (None: defaults), apply `overrides` in order, validate.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or a broken rule between values.
    """
    raw = _read_yaml(path) if path is not None else {}
    for override in overrides or []:
        _apply_override(raw, override)
    config: RunConfig = _build(RunConfig, raw, "")
    validate(config, world_size)
    return config


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict`; unknown keys are errors here too."""
    config: RunConfig = _build(RunConfig, raw, "")
    validate(config)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the config {path}: {error.strerror}; give --config an existing YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of sections, it holds a {type(raw).__name__}")
    return raw


def _apply_override(raw: dict[str, Any], override: str) -> None:
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


def _build(cls: type, raw: Any, prefix: str) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} is a section, it cannot be set to {raw!r}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in hints:
            raise UserError(_unknown_key(f"{prefix}{key}", str(key), prefix, list(hints)))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            values[key] = _build(hint, value if value is not None else {}, f"{prefix}{key}.")
        else:
            values[key] = _convert(value, hint, f"{prefix}{key}")
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in values and _is_required(f)]
    if missing:
        raise UserError(f"{prefix}{missing[0]} is missing; every entry of {prefix.partition('[')[0]} needs one")
    return cls(**values)


def _is_required(key: dataclasses.Field[Any]) -> bool:
    return key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING


def _unknown_key(full: str, key: str, prefix: str, known: list[str]) -> str:
    everywhere = _all_keys(RunConfig, "")
    same_name = [known_key for known_key in everywhere if known_key.endswith(f".{key}")]
    siblings = [prefix + name for name in difflib.get_close_matches(key, known, n=1)]
    # The right name in the wrong section, else a misspelt name in this section, else whatever comes nearest.
    nearest = [*same_name, *siblings, *difflib.get_close_matches(full, everywhere, n=1, cutoff=0.0)]
    return f"unknown config key {full!r}; the nearest known key is {nearest[0]!r}"


def _all_keys(cls: type, prefix: str) -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            keys += _all_keys(hint, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _convert(value, next(a for a in arguments if a is not type(None)), key)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise UserError(f"{key} is {value!r}, it must be one of {', '.join(map(str, arguments))}")
        return arguments[arguments.index(value)]  # 1.0 means 1
    if origin in (list, dict):
        return _convert_collection(value, origin, arguments, key)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, f"{key}.")
    return _convert_scalar(value, hint, key)


def _convert_collection(value: Any, origin: Any, arguments: tuple[Any, ...], key: str) -> Any:
    if not isinstance(value, origin):
        raise UserError(f"{key} is {value!r}, it must be a {'list' if origin is list else 'mapping'}")
    if origin is list:
        return [_convert(item, arguments[0], f"{key}[{number}]") for number, item in enumerate(value)]
    if arguments[1] is Any:
        return value
    return {str(name): _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}


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
