"""`nextlat train`: the command line of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.reporting.console import say
from nextlat_dist.training.health.launcher import end_with_launcher, mark_began, mark_end
from nextlat_dist.training.health.signals import EXIT_STOPPED, StoppedBySignal, StopRequest


def add_command(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model; start it with a script in launch/ for several ranks")
    train.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    train.add_argument("--dry-run", action="store_true", help="check and describe the run and its data, build nothing")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as training.seed=7")
    train.set_defaults(run_command=_train)


def _train(options: argparse.Namespace) -> None:
    from nextlat_dist.config.load import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from nextlat_dist.training.dry_run import dry_run

        say(dry_run(config))
        mark_end(0)
        return
    end_with_launcher()
    stop = StopRequest().install()  # before the imports that take seconds
    mark_began()
    from nextlat_dist.training.run import train

    result = train(config, stop)
    mark_end(EXIT_STOPPED if result.stopped else 0)
    if result.stopped:
        raise StoppedBySignal(result.steps)
