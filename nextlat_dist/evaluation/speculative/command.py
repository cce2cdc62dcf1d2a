"""`nextlat evaluate speculative`: speed and acceptance of self-speculative decoding.

nextlat evaluate speculative --export DIR --prompts prompts/ --json FILE --pictures DIR
nextlat evaluate speculative --export nextlat=DIR mtp=DIR --prompts prompts/ --draft-length 0..10,adaptive
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.speculative.options import Options
from nextlat_dist.reporting.options import add_fields, add_outputs, given


def add_command(kinds: Any) -> None:
    speculative = kinds.add_parser("speculative", help="speed and acceptance of self-speculative decoding")
    speculative.add_argument(
        "--export",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="written by `nextlat export`; the first is the main one, called nextlat if it has no name",
    )
    speculative.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="files of prompts, or folders with a file per domain"
    )
    speculative.add_argument("--rival", type=Path, metavar="DIR", help="the same as --export … mtp=DIR (default: none)")
    add_fields(speculative, Options)
    add_outputs(speculative, pictures="PNGs")
    speculative.set_defaults(run_command=_evaluate_speculative)


def _evaluate_speculative(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.speculative.measure import evaluate_speculative
    from nextlat_dist.reporting.publish import publish

    report = evaluate_speculative(options.export, options.prompts, rival=options.rival, **given(options, Options))
    publish(report, options.json, options.pictures)
