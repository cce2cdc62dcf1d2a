r"""`nextlat ablate`: a grid of small runs, trained, exported, evaluated and compared over seeds.

    nextlat ablate --config configs/ablations/hmm.yaml --output runs/ablations --jobs 2 \
        --json ablations.json --pictures DIR

The same command continues where it was interrupted. Exit status 1 when a cell failed or a number is nowhere.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from nextlat_dist.reporting.options import add_outputs, integers


def add_command(commands: Any) -> None:
    command = commands.add_parser("ablate", help="train variants of a run over seeds, and compare them")
    command.add_argument("--config", type=Path, required=True, help="the grid; see configs/ablations/")
    command.add_argument("--output", type=Path, required=True, help="directory for the data and every run")
    command.add_argument("--seeds", type=_seeds, metavar="0,1,2", help="of the runs (default: the grid's own)")
    command.add_argument("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    command.add_argument(
        "--launcher",
        type=shlex.split,
        default=[],
        metavar="COMMAND",
        help="starts each training when the path of its config is added, such as 'bash launch/single_node.sh' "
        "(default: nextlat train --config)",
    )
    add_outputs(command, pictures="a PNG")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, after the grid's")
    command.set_defaults(run_command=_ablate)


def _seeds(text: str) -> list[int]:
    """Distinct ones, in order."""
    return list(dict.fromkeys(integers(text)))


def _ablate(options: argparse.Namespace) -> None:
    from nextlat_dist.experiments.ablate import ablate
    from nextlat_dist.reporting.publish import publish

    # As Ctrl-C: what runs is asked to end, and a training saves first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    report = ablate(
        options.config,
        options.output,
        seeds=options.seeds,
        jobs=options.jobs,
        overrides=options.overrides,
        launcher=options.launcher,
    )
    publish(report, options.json, options.pictures)
    if report.extra["failures"] or report.extra["missing"]:
        sys.exit(1)
