"""`nextlat report`: merge a run's measurements into one page.

nextlat report --run runs/NAME
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    report = commands.add_parser("report", help="merge a run's measurements into report.json, report.md and pictures")
    report.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run's output_dir")
    report.set_defaults(run_command=_report)


def _report(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.run_report.publish import write_run_report
    from nextlat_dist.reporting.console import say

    say(json.dumps(write_run_report(options.run), indent=2))
