"""`nextlat evaluate task`: how well exports do the task that a dataset was drawn from.

nextlat evaluate task --export gpt=DIR nextlat=DIR --data data/path-star/test --json FILE --pictures DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.exports import add_exports
from nextlat_dist.reporting.options import add_outputs, numbers


def add_command(kinds: Any) -> None:
    task = kinds.add_parser("task", help="accuracy on a dataset of `nextlat-data task`, exports side by side")
    add_exports(task)
    task.add_argument("--data", type=Path, required=True, help="a split that `nextlat-data task` wrote")
    task.add_argument(
        "--documents", type=int, default=1000, metavar="N", help="score the first N documents (default: 1000)"
    )
    task.add_argument(
        "--temperature",
        type=numbers,
        default=[0.0, 1.0],
        metavar="0,1",
        help="of answers; 0 is greedy (default: 0,1)",
    )
    task.add_argument("--seed", type=int, default=0, help="of sampled answers (default: 0)")
    add_outputs(task, pictures="PNGs")
    task.set_defaults(run_command=_evaluate_task)


def _evaluate_task(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.tasks.measure import evaluate_task
    from nextlat_dist.reporting.publish import publish

    report = evaluate_task(
        options.export,
        options.data,
        documents=options.documents,
        temperatures=options.temperature,
        seed=options.seed,
    )
    publish(report, options.json, options.pictures)
