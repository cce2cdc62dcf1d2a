"""A grid of runs: a YAML file that names a training config, variants of it, seeds, and what to measure of each run.

    base: state_tracking.yaml                    # training config, relative to the grid's file
    data: [task, state-tracking, --output, "{data}", --train, "20000", …]     # optional: arguments of nextlat-data
    then: {NAME: [shard, --output, …], …}        # optional: further arguments of nextlat-data, in this order
    settings: {data.train: "{data}/train", data.validation: "{data}/test"}    # dotted keys, for every cell
    seeds: [0, 1, 2]
    variants:                                    # name: dotted keys that differ from the base
      both: {}
      hidden only: {objective.lambda_kl: 0}
    runs: "{variant}-{seed}"                     # optional: where a cell's run and export are, below the output
    exports:                                     # optional: made of a cell's export, each by a `nextlat` command
      refitted:                                  # `--output` is added; "{refitted}" stands for it in evaluations
        arguments: [fit-drafter, --model, "{export}", --data, "{data}/train"]
        only: [both]                             # optional: the variants that get one
    training:                                    # field of the run's metrics.jsonl: heading; the last value counts,
                                                 # of step_seconds the median
      validation_next_token: held-out loss
    evaluations:                                 # of each cell: `nextlat evaluate` with a --json of its own
      tracking:
        arguments: [task, --export, "{export}", --data, "{data}/test"]
        numbers: {rnn_accuracy: latent RNN}      # name in the summary of that JSON: heading
        only: [both]                             # optional: the variants that are asked
    together:                                    # of all cells: `nextlat evaluate`, its --json is OUTPUT/NAME.json
      report: [task, --export, "{exports}", --data, "{data}/test", --pictures, "{output}"]

`{output}` and `{data}` stand for the grid's directories, `{run}` and `{export}` for a cell's, and the word `{exports}`
for `VARIANT=DIR` of every cell. A cell is a variant with a seed (training.seed). Invariant: every cell's config was
built and validated before the first one starts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from nextlat_dist.config.keys import Bounds, check_bounds
from nextlat_dist.config.load import load_config
from nextlat_dist.config.read import build, read_yaml
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError

TRAINING = "training"  # what numbers of metrics.jsonl belong to, as others belong to an evaluation
DATA = "data"  # the step that comes first, and the folder that it writes
RESERVED = (TRAINING, "train", "export", DATA, "grid", "run", "output")  # names of other steps, files, placeholders
SEEDS = Bounds(
    "hold whole numbers, none negative, each once",
    lambda seeds: len(set(seeds)) == len(seeds) > 0 and all(seed >= 0 for seed in seeds),
)
RUNS = Bounds("hold both {variant} and {seed}", lambda runs: "{variant}" in runs and "{seed}" in runs)
Words = list[str | int | float]


@dataclass(frozen=True)
class Evaluation:
    """Arguments of `nextlat evaluate`, and the summary's numbers to collect: name → heading."""

    arguments: Annotated[Words, "of nextlat evaluate"]
    numbers: Annotated[dict[str, str], "name in the summary: heading"]
    only: Annotated[list[str], "variants that are asked; none named: all"] = field(default_factory=list)


@dataclass(frozen=True)
class DerivedExport:
    """Arguments of `nextlat` that make another export of a cell's; `--output` is added."""

    arguments: Annotated[Words, "of nextlat, without --output"]
    only: Annotated[list[str], "variants that get one; none named: all"] = field(default_factory=list)


@dataclass(frozen=True)
class Grid:
    """A grid's file, read; the keys are those of the module's text."""

    base: Annotated[str, "training config, relative to the grid's file"]
    seeds: Annotated[list[int], "of the runs", SEEDS]
    variants: Annotated[dict[str, dict[str, Any]], "name: dotted keys that differ from the base"]
    data: Annotated[Words, "arguments of nextlat-data"] = field(default_factory=list)
    then: Annotated[dict[str, Words], "name: arguments of nextlat-data, after `data`"] = field(default_factory=dict)
    settings: Annotated[dict[str, Any], "dotted keys, for every cell"] = field(default_factory=dict)
    runs: Annotated[str | None, "where a cell's run is, below the output", RUNS] = None
    exports: Annotated[dict[str, DerivedExport], "made of each cell's export"] = field(default_factory=dict)
    training: Annotated[dict[str, str], "field of metrics.jsonl: heading"] = field(default_factory=dict)
    evaluations: Annotated[dict[str, Evaluation], "of each cell"] = field(default_factory=dict)
    together: Annotated[dict[str, Words], "of all cells"] = field(default_factory=dict)

    def variants_of(self, step: Evaluation | DerivedExport) -> list[str]:
        """Those that a step is for."""
        return [variant for variant in self.variants if not step.only or variant in step.only]

    @property
    def headings(self) -> dict[str, str]:
        """Every collected number: `evaluation/name` → heading."""
        found = {f"{TRAINING}/{name}": heading for name, heading in self.training.items()}
        for kind, evaluation in self.evaluations.items():
            found |= {f"{kind}/{name}": heading for name, heading in evaluation.numbers.items()}
        return found


@dataclass(frozen=True)
class GridCell:
    """One run of the grid.

    Attributes:
        directory: logs, stamps and measurements.
        run: the training's output directory.
        export: of its last checkpoint.
    """

    variant: str
    seed: int
    directory: Path
    run: Path
    export: Path
    config: RunConfig

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def read_grid(path: Path) -> Grid:
    """Raises UserError: an unreadable file, an unknown or missing key, a value of another type."""
    grid = build(Grid, read_yaml(path, "grid"), "grid")
    check_bounds(grid)
    named: dict[str, Collection[str]] = {"then": grid.then, "exports": grid.exports, "evaluations": grid.evaluations}
    for kind, names in (named | {"together": grid.together}).items():
        for name in names:
            if not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
                raise UserError(
                    f"{kind}.{name} must have a name of letters, digits and -, none of {', '.join(RESERVED)}; rename it"
                )
    for name in set(grid.then) & set(grid.together):
        raise UserError(f"then.{name} and together.{name} would share a log; rename one")
    for name in set(grid.exports) & set(grid.evaluations):
        raise UserError(f"exports.{name} and evaluations.{name} would share a log; rename one")
    steps: dict[str, DerivedExport | Evaluation] = {f"exports.{name}": one for name, one in grid.exports.items()}
    for key, step in (steps | {f"evaluations.{name}": one for name, one in grid.evaluations.items()}).items():
        for variant in step.only:
            if variant not in grid.variants:
                raise UserError(
                    f"{key}.only names {variant!r}, which is no variant; there are {', '.join(grid.variants)}"
                )
        for made in exports_read(grid, step.arguments):
            left = [
                variant for variant in grid.variants_of(step) if variant not in grid.variants_of(grid.exports[made])
            ]
            if left:
                raise UserError(
                    f"{key} reads {{{made}}}, but exports.{made}.only leaves out {', '.join(left)}; add it there"
                )
    if not grid.variants or not (grid.headings or grid.together):
        raise UserError(
            f"{path} has {len(grid.variants)} variants and {len(grid.headings)} numbers to collect; give at least one "
            "of each, or evaluate the cells `together`"
        )
    return replace(grid, base=str(path.parent / grid.base))


def exports_read(grid: Grid, arguments: Words) -> list[str]:
    """Names of derived exports that arguments mention."""
    return [name for name in grid.exports if any(f"{{{name}}}" in str(word) for word in arguments)]


def cells_of(grid: Grid, seeds: Sequence[int], output: Path, overrides: Sequence[str] = ()) -> list[GridCell]:
    """All cells, seed by seed, so that a grid cut short compares whole variants.

    Raises:
        UserError: a setting that `nextlat train` would refuse on one rank; variants whose directories would be one.
    """
    folders: dict[str, str] = {}
    cells = []
    for seed in seeds:
        for variant, differences in grid.variants.items():
            folder = re.sub(r"[^A-Za-z0-9.]+", "-", variant).strip("-.")
            if folders.setdefault(folder, variant) != variant or not folder:
                raise UserError(
                    f"variants {folders[folder]!r} and {variant!r} differ in no letter or digit; rename one"
                )
            directory = output / "cells" / folder / f"seed-{seed}"
            run, export = directory / "run", directory / "export"
            if grid.runs is not None:
                run = output / grid.runs.replace("{variant}", folder).replace("{seed}", str(seed))
                export = run / "export"
            settings = {**grid.settings, **differences, "training.seed": seed, "output_dir": str(run)}
            given = [f"{key}={json.dumps(_filled(value, output))}" for key, value in settings.items()]
            try:
                config = load_config(Path(grid.base), [*given, *overrides], world_size=1)
            except UserError as error:
                raise UserError(f"variant {variant}: {error}") from None
            if config.output_dir != str(run):
                raise UserError(f"output_dir is {config.output_dir}, it must be the cell's own; leave it out")
            cells.append(GridCell(variant, seed, directory, run, export, config))
    return cells


def _filled(value: Any, output: Path) -> Any:
    return value.replace("{data}", str(output / "data")) if isinstance(value, str) else value
