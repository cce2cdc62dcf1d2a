"""What a grid is: a YAML file that names a training config, variants of it, seeds, and what to measure of each run.

    base: state_tracking.yaml                    # training config, relative to the grid's file
    data: [task, state-tracking, --output, "{data}", --train, "20000", …]     # optional: arguments of nextlat-data
    settings: {data.train: "{data}/train", data.validation: "{data}/test"}    # dotted keys, for every cell
    seeds: [0, 1, 2]
    variants:                                    # name: dotted keys that differ from the base
      both: {}
      hidden only: {objective.lambda_kl: 0}
    training:                                    # field of the run's metrics.jsonl: heading; the last value counts
      validation_next_token: held-out loss
    evaluations:                                 # `nextlat evaluate` with these arguments and a --json of its own
      tracking:
        arguments: [task, --export, "{export}", --data, "{data}/test"]
        numbers: {rnn_accuracy: latent RNN}      # name in the summary of that JSON: heading

`{data}`, `{run}` and `{export}` stand for the grid's data and a cell's directories. A cell is a variant with a seed
(training.seed). Invariant: every cell's config was built and validated before the first one starts.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nextlat_dist.config.load import load_config
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError

TRAINING = "training"  # what numbers of metrics.jsonl belong to, as others belong to an evaluation
RESERVED = (TRAINING, "train", "export")  # the last two name other steps of a cell


@dataclass(frozen=True)
class Evaluation:
    """Arguments of `nextlat evaluate`, and the summary's numbers to collect: name → heading."""

    arguments: tuple[str, ...]
    numbers: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A grid's file, read. `variants`: name → dotted key → value."""

    base: Path
    data: tuple[str, ...]
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    variants: Mapping[str, Mapping[str, Any]]
    training: Mapping[str, str]
    evaluations: Mapping[str, Evaluation]

    @property
    def headings(self) -> dict[str, str]:
        """Every collected number: `evaluation/name` → heading."""
        found = {f"{TRAINING}/{name}": heading for name, heading in self.training.items()}
        for kind, evaluation in self.evaluations.items():
            found |= {f"{kind}/{name}": heading for name, heading in evaluation.numbers.items()}
        return found


@dataclass(frozen=True)
class Cell:
    """One run of the grid; its training runs in `directory`/run."""

    variant: str
    seed: int
    directory: Path
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def read_grid(path: Path) -> Grid:
    """Raises UserError: an unreadable file, an unknown or missing key, a value of another kind."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the grid {path}: {error.strerror}; give --config an existing YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    keys = {"base": True, "data": False, "settings": False, "seeds": True, "variants": True}
    keys |= {TRAINING: False, "evaluations": False}
    raw = _mapping(raw, str(path))
    _check_keys(raw, keys, str(path))
    variants = _mapping(raw["variants"], "variants")
    evaluations = {}
    for name, given in _mapping(raw.get("evaluations"), "evaluations").items():
        where = f"evaluation {name}"
        asked = _mapping(given, where)
        _check_keys(asked, {"arguments": True, "numbers": True}, where)
        if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
            raise UserError(f"{where}: use letters, digits and -, and none of {', '.join(RESERVED)}; rename it")
        evaluations[name] = Evaluation(_words(asked["arguments"], where), _texts(asked["numbers"], where))
    grid = Grid(
        base=path.parent / str(raw["base"]),
        data=_words(raw.get("data", []), "data"),
        settings=_mapping(raw.get("settings"), "settings"),
        seeds=_seeds(raw["seeds"]),
        variants={name: _mapping(given, f"variant {name}") for name, given in variants.items()},
        training=_texts(raw.get(TRAINING), TRAINING),
        evaluations=evaluations,
    )
    if not grid.variants or not grid.headings:
        raise UserError(
            f"{path} has {len(grid.variants)} variants and {len(grid.headings)} numbers to collect; give at least one "
            "of each"
        )
    return grid


def cells_of(grid: Grid, seeds: Sequence[int], output: Path) -> list[Cell]:
    """All cells, seed by seed, so that a grid cut short compares whole variants.

    Raises:
        UserError: a setting that `nextlat train` would refuse on one rank; variants whose directories would be one.
    """
    places: dict[str, str] = {}
    cells = []
    for seed in seeds:
        for variant, differences in grid.variants.items():
            place = re.sub(r"[^A-Za-z0-9.]+", "-", variant).strip("-.")
            if places.setdefault(place, variant) != variant or not place:
                raise UserError(f"variants {places[place]!r} and {variant!r} differ in no letter or digit; rename one")
            directory = output / "cells" / place / f"seed-{seed}"
            settings = {
                **grid.settings,
                **differences,
                "training.seed": seed,
                "output_dir": str(directory / "run"),
            }
            overrides = [f"{key}={json.dumps(_filled(value, output))}" for key, value in settings.items()]
            try:
                config = load_config(grid.base, overrides, world_size=1)
            except UserError as error:
                raise UserError(f"variant {variant}: {error}") from None
            cells.append(Cell(variant, seed, directory, config))
    return cells


def _filled(value: Any, output: Path) -> Any:
    return value.replace("{data}", str(output / "data")) if isinstance(value, str) else value


def _check_keys(given: Mapping[str, Any], known: Mapping[str, bool], where: str) -> None:
    for key in given:
        if key not in known:
            (nearest,) = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UserError(f"{where}: unknown key {key!r}; the nearest known key is {nearest!r}")
    for key, required in known.items():
        if required and key not in given:
            raise UserError(f"{where}: the key {key!r} is missing; add it")


def _mapping(given: Any, where: str) -> dict[str, Any]:
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{where} is {given!r}, it must be a mapping")
    return {str(key): value for key, value in (given or {}).items()}


def _texts(given: Any, where: str) -> dict[str, str]:
    return {name: str(text) for name, text in _mapping(given, f"the numbers of {where}").items()}


def _words(given: Any, where: str) -> tuple[str, ...]:
    if not isinstance(given, list) or any(isinstance(word, (dict, list)) for word in given):
        raise UserError(f"the arguments of {where} are {given!r}; give a list of words")
    return tuple(str(word) for word in given)


def _seeds(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or any(type(seed) is not int or seed < 0 for seed in given):
        raise UserError(f"seeds is {given!r}, it must be a list of whole numbers, none negative")
    if len(set(given)) < len(given):
        raise UserError(f"seeds is {given!r}; give each number once")
    return tuple(given)
