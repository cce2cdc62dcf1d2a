"""`nextlat doctor`: its options, and what it shows. Exit status 1 when there is a problem."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="say what is missing before a run; exit status 1 if anything is")
    doctor.add_argument(
        "--config", type=Path, metavar="FILE", help="the run's YAML file: also check the disk for it (default: no run)"
    )
    doctor.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="also ask its hosts over ssh (default: this host only)"
    )
    doctor.add_argument("--quick", action="store_true", help="problems only, and nothing that has to be waited for")
    doctor.add_argument(
        "--strict", action="store_true", help="an output_dir whose run may be dead is a problem (default: a note)"
    )
    doctor.add_argument("--json", type=Path, metavar="FILE", help="write the findings here (default: nowhere)")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    doctor.set_defaults(run_command=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    from nextlat_dist.config.load import load_config
    from nextlat_dist.doctor.examine import description, examine, shown
    from nextlat_dist.doctor.findings import problems, to_json
    from nextlat_dist.parallel.environment import is_first_rank
    from nextlat_dist.reporting.console import say
    from nextlat_dist.reporting.report import write_json
    from nextlat_dist.training.health.launcher import mark_checked

    config = None if options.config is None else load_config(options.config, options.overrides)
    findings = examine(config, options.hostfile, options.quick, options.strict)
    if config is not None and not options.quick and is_first_rank():
        say(description(config, options.hostfile) + "\n")
    for text in shown(findings, options.quick):
        say(text, error=text.startswith("error: "))
    if options.json is not None and is_first_rank():
        write_json(options.json, to_json(findings))
    if problems(findings):
        sys.exit(1)
    if "RANK" not in os.environ:
        mark_checked()
