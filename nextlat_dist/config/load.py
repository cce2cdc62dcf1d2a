"""A `RunConfig` from a YAML file with dotted overrides, or from a mapping, and back."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import yaml

from nextlat_dist.config.entries import OBJECTIVES, PREDICTORS
from nextlat_dist.config.keys import shown
from nextlat_dist.config.locations import locate, without_secret_values
from nextlat_dist.config.read import apply_override, build, read_yaml
from nextlat_dist.config.rules import validate
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.config.yaml_text import Plain
from nextlat_dist.errors import UserError


def load_config(path: Path | None, overrides: list[str] | None = None, world_size: int | None = None) -> RunConfig:
    """Read `path` (None: defaults), apply `overrides` in order, replace `~` and variables in paths, validate.

    Raises:
        UserError: unreadable file, unknown key, wrong type, unknown variable, or a broken rule between values.
    """
    raw = read_yaml(path) if path is not None else {}
    for override in overrides or []:
        apply_override(raw, override)
    config = build(RunConfig, _with_todays_names(raw))
    OBJECTIVES.allow(config.objective.name)
    PREDICTORS.allow(config.predictor.fusion)
    locate(config)
    validate(config, world_size)
    return config


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_dict`; unknown keys are errors here too. Paths stay as they are."""
    config = build(RunConfig, _with_todays_names(raw))
    validate(config)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """For files, messages and services: URLs without passwords and signatures."""
    found: dict[str, Any] = without_secret_values(dataclasses.asdict(config))
    return found


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _with_todays_names(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` as read from a file, or as a run wrote it, without keys of former versions.

    Raises:
        UserError: a former key has no value that it could have, or contradicts today's.
    """
    training = raw.get("training")
    if not isinstance(training, dict) or "activation_checkpointing" not in training:
        return raw
    training = dict(training)
    given = training.pop("activation_checkpointing")
    value = given.value if isinstance(given, Plain) else given
    if not isinstance(value, bool):
        raise UserError(
            f"training.activation_checkpointing is {shown(given)}, it must be true or false; it is called "
            "training.recompute today, with the values none, selective and full"
        )
    if value:
        if "recompute" in training:
            raise UserError(
                "training.activation_checkpointing=true and training.recompute are both set; remove the former, which "
                "means training.recompute=full"
            )
        training["recompute"] = "full"
        warnings.warn(
            "training.activation_checkpointing=true is called training.recompute=full today",
            FutureWarning,
            stacklevel=4,
        )
    return {**raw, "training": training}
