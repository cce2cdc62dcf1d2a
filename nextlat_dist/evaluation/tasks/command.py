"""`nextlat evaluate task`: how well exports do the task that a dataset was drawn from.

nextlat evaluate task --export gpt=DIR nextlat=DIR --data data/path-star/test --json FILE --pictures DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.reporting.options import numbers


def add_command(kinds: Any) -> None:
    task = kinds.add_parser("task", help="accuracy on a dataset of `nextlat-data task`, exports side by side")
    task.add_argument(
        "--export", nargs="+", required=True, metavar="[NAME=]DIR", help="those of one NAME are runs (seeds) of it"
    )
    task.add_argument("--data", type=Path, required=True, help="a split that `nextlat-data task` wrote")
    task.add_argument("--documents", type=int, default=1000, help="score the first N documents")
    task.add_argument("--temperature", type=numbers, default=[0.0, 1.0], metavar="0,1", help="of answers; 0: greedy")
    task.add_argument("--seed", type=int, default=0, help="of sampled answers")
    task.add_argument("--json", type=Path, help="where to write the measurements")
    task.add_argument("--pictures", type=Path, metavar="DIR", help="where to write PNGs")
    task.set_defaults(run_command=_evaluate_task)


def _evaluate_task(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.tasks.report import evaluate_task

    evaluate_task(
        options.export,
        options.data,
        documents=options.documents,
        temperatures=options.temperature,
        seed=options.seed,
        json_path=options.json,
        picture_dir=options.pictures,
    )
