"""`nextlat evaluate lm`: scores of exports on benchmarks of language models, side by side.

nextlat evaluate lm --export gpt=DIR nextlat=DIR --tasks paper --json FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.exports import add_exports
from nextlat_dist.evaluation.lm.measure import PAPER_TASKS
from nextlat_dist.reporting.options import add_outputs


def add_command(kinds: Any) -> None:
    lm = kinds.add_parser("lm", help="benchmarks of language models, by lm-evaluation-harness")
    add_exports(lm)
    lm.add_argument(
        "--tasks",
        type=_names,
        default=list(PAPER_TASKS),
        metavar="A,B,…",
        help="the harness's names, and paper for the nine of the paper (default: paper)",
    )
    lm.add_argument(
        "--include-path",
        type=Path,
        metavar="DIR",
        help="tasks of your own, as the harness's YAML files (default: none)",
    )
    lm.add_argument("--limit", type=int, metavar="N", help="documents per task, for a trial (default: all)")
    lm.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows scored together (default: 8)")
    add_outputs(lm)
    lm.set_defaults(run_command=_evaluate_lm)


def _names(text: str) -> list[str]:
    """`paper,mmlu` -> the paper's tasks and mmlu."""
    return [name for part in text.split(",") for name in (PAPER_TASKS if part == "paper" else (part,))]


def _evaluate_lm(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.lm import measure
    from nextlat_dist.reporting.publish import publish

    report = measure.evaluate_lm(
        options.export,
        options.tasks,
        include_path=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    publish(report, options.json)
