"""`nextlat-data task`: its options, which are the fields of the task classes, and what it prints.

nextlat-data task state-tracking --group A5 --length 12 --test-length 16 36 --output data/a5 --train 100_000 --test 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.options import add_sizes
from data_tools.shards.shard_report import describe
from data_tools.tasks import TaskOptions, write_task
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.options import add_fields, given
from nextlat_dist.tasks import make_task, task_class, task_names


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    task = commands.add_parser(
        "task",
        help="write a planning or world-model task as train and test sets that share no problem",
    )
    kinds = task.add_subparsers(required=True, metavar="NAME")
    for name in task_names():
        cls = task_class(name)
        parser = kinds.add_parser(name, help=(cls.__doc__ or "").split("\n")[0])
        add_fields(parser, cls)
        parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets DIR/train and DIR/test")
        parser.add_argument("--train", type=int, required=True, metavar="N", help="documents of the training set")
        parser.add_argument("--test", type=int, required=True, metavar="N", help="documents of the test set")
        parser.add_argument(
            "--seed", type=int, default=TaskOptions.seed, metavar="N", help="of the documents (default: %(default)s)"
        )
        add_sizes(parser)
        parser.add_argument("--overwrite", action="store_true", help="replace finished datasets in DIR")
        parser.set_defaults(run=_run, task=name)


def _run(options: argparse.Namespace) -> None:
    parameters = given(options, task_class(options.task))
    plan = TaskOptions(
        output=options.output,
        train=options.train,
        test=options.test,
        seed=options.seed,
        record_tokens=options.record_tokens,
        shard_tokens=options.shard_tokens,
        overwrite=options.overwrite,
    )
    for split, manifest in write_task(make_task(options.task, parameters), plan).items():
        say(describe(manifest, plan.output / split))
