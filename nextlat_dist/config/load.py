"""A `RunConfig` from a YAML file with dotted overrides, or from a mapping, and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from nextlat_dist.config.entries import OBJECTIVES, PREDICTORS
from nextlat_dist.config.locations import locate, without_secret_values
from nextlat_dist.config.read import apply_override, build, read_yaml
from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig


def load_config(path: Path | None, overrides: list[str] | None = None, world_size: int | None = None) -> RunConfig:
    """Read `path` (None: defaults), apply `overrides` in order, replace `~` and variables in paths, validate.

    Raises:
        UserError: unreadable file, unknown key, wrong type, unknown variable, or a broken rule between values.
    """
    raw = read_yaml(path) if path is not None else {}
    for override in overrides or []:
        apply_override(raw, override)
    config = build(RunConfig, raw)
    OBJECTIVES.allow(config.objective.name)
    PREDICTORS.allow(config.predictor.fusion)
    locate(config)
    validate(config, world_size)
    return config


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict`; unknown keys are errors here too. Paths stay as they are."""
    config = build(RunConfig, raw)
    validate(config)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """For files, messages and services: URLs without passwords and signatures."""
    found: dict[str, Any] = without_secret_values(dataclasses.asdict(config))
    return found


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)
