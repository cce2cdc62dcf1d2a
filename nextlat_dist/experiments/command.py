r"""`nextlat ablate`: a grid of small runs, trained, exported, evaluated and compared over seeds; `nextlat experiments`:
several grids on one page.

    nextlat ablate --config configs/ablations/hmm.yaml --output runs/ablations --jobs 2 \
        --json ablations.json --pictures DIR

    nextlat experiments field --scale cpu --output runs/field --jobs 2 --json field.json --pictures DIR
    nextlat experiments price --scale cpu --output runs/field --jobs 2 --json price.json --pictures DIR

The same command continues where it was interrupted. Exit status 1 when a cell failed or a number is nowhere.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextlat_dist.reporting.options import add_outputs, integers

if TYPE_CHECKING:
    from nextlat_dist.reporting.report import Report


def add_command(commands: Any) -> None:
    command = commands.add_parser("ablate", help="train variants of a run over seeds, and compare them")
    command.add_argument("--config", type=Path, required=True, help="the grid; see configs/ablations/")
    _add_runs(command)
    command.add_argument(
        "--launcher",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help="starts each training when the path of its config is added, such as 'bash launch/single_node.sh' "
        "(default: nextlat train --config)",
    )
    command.set_defaults(run_command=_ablate)
    experiments = commands.add_parser("experiments", help="several grids of runs on one page")
    kinds = experiments.add_subparsers(required=True, metavar="WHAT")
    whole = kinds.add_parser("field", help="every objective, on text and on the paper's tasks")
    whole.add_argument("--scale", choices=["cpu"], required=True, help="cpu: what two cores train in hours")
    whole.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        metavar="text,path_star,countdown,tracking",
        default=[],
        help="(default: all)",
    )
    _add_runs(whole)
    whole.set_defaults(run_command=_field)
    price = kinds.add_parser("price", help="what a drafter costs the base, at equal tokens and at equal seconds")
    price.add_argument("--scale", choices=["cpu"], required=True, help="cpu: what two cores train in hours")
    _add_runs(price)
    price.set_defaults(run_command=_price)


def _add_runs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", type=Path, required=True, help="directory for the data and every run")
    command.add_argument("--seeds", type=_seeds, metavar="0..2,5", help="of the runs (default: the grid's own)")
    command.add_argument("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    add_outputs(command, pictures="a PNG")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, after the grid's")


def _seeds(text: str) -> list[int]:
    """Distinct ones, in order."""
    return list(dict.fromkeys(integers(text)))


def _ablate(options: argparse.Namespace) -> None:
    from nextlat_dist.experiments.ablate import ablate

    _as_interrupted()
    report = ablate(
        options.config,
        options.output,
        seeds=options.seeds,
        jobs=options.jobs,
        overrides=options.overrides,
        launcher=options.launcher,
    )
    _publish(report, options)


def _field(options: argparse.Namespace) -> None:
    from nextlat_dist.experiments.field import field

    _as_interrupted()
    report = field(
        options.scale,
        options.output,
        parts=options.parts,
        seeds=options.seeds,
        jobs=options.jobs,
        overrides=options.overrides,
    )
    _publish(report, options)


def _price(options: argparse.Namespace) -> None:
    from nextlat_dist.experiments.price import price

    _as_interrupted()
    report = price(options.output, seeds=options.seeds, jobs=options.jobs, overrides=options.overrides)
    _publish(report, options)


def _as_interrupted() -> None:
    """SIGTERM as Ctrl-C: what runs is asked to end, and a training saves first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _publish(report: Report, options: argparse.Namespace) -> None:
    from nextlat_dist.reporting.publish import publish

    publish(report, options.json, options.pictures)
    if report.extra["failures"] or report.extra["missing"]:
        sys.exit(1)
