"""`nextlat train`: the command line of a training run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.reporting.console import say
from nextlat_dist.training.health.signals import StoppedBySignal, StopRequest


def add_command(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model; start it with a script in launch/ for several ranks")
    train.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    train.add_argument("--dry-run", action="store_true", help="check and describe the run, build nothing")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as training.seed=7")
    train.set_defaults(run_command=_train)


def _train(options: argparse.Namespace) -> None:
    from nextlat_dist.config.load import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        say(dry_run(config))
        return
    stop = StopRequest().install()  # before the imports that take seconds
    from nextlat_dist.training.run import train

    result = train(config, stop)
    if result.stopped:
        raise StoppedBySignal(result.steps)


def dry_run(config: RunConfig) -> str:
    """Everything that can be checked and said without building anything: description, stages, resolved config.

    Raises:
        UserError: what `train` would refuse on so many ranks (`WORLD_SIZE`, or the fewest that `parallel` needs).
    """
    from nextlat_dist.config.load import dump_config
    from nextlat_dist.config.rules import validate
    from nextlat_dist.plan.describe import data_parallel_size, describe, describe_stages
    from nextlat_dist.training.engine.deepspeed_config import deepspeed_config

    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    world = int(os.environ.get("WORLD_SIZE", tp * pp))
    validate(config, world)
    deepspeed_config(config, data_parallel_size(config, world))
    return "\n".join([describe(config, world), describe_stages(config), "", dump_config(config)])
