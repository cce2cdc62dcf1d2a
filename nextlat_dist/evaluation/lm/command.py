"""`nextlat evaluate lm`: scores of exports on benchmarks of language models, side by side.

nextlat evaluate lm --export gpt=DIR nextlat=DIR --tasks paper --json FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.lm.measure import PAPER_TASKS


def add_command(kinds: Any) -> None:
    lm = kinds.add_parser("lm", help="benchmarks of language models, by lm-evaluation-harness")
    lm.add_argument("--export", nargs="+", required=True, metavar="[NAME=]DIR", help="written by `nextlat export`")
    lm.add_argument("--tasks", type=_names, default=list(PAPER_TASKS), metavar="A,B,…", help="default: paper's nine")
    lm.add_argument("--include-path", type=Path, metavar="DIR", help="tasks of your own, as the harness's YAML files")
    lm.add_argument("--limit", type=int, help="documents per task, for a trial; default: all")
    lm.add_argument("--batch-size", type=int, default=8, help="rows scored together; default: %(default)s")
    lm.add_argument("--json", type=Path, help="where to write the scores")
    lm.set_defaults(run_command=_evaluate_lm)


def _names(text: str) -> list[str]:
    """`paper,mmlu` -> the paper's tasks and mmlu."""
    return [name for part in text.split(",") for name in (PAPER_TASKS if part == "paper" else (part,))]


def _evaluate_lm(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.lm import measure

    measure.evaluate_lm(
        options.export,
        options.tasks,
        include_path=options.include_path,
        limit=options.limit,
        batch_size=options.batch_size,
        json_path=options.json,
    )
