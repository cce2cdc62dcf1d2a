"""`nextlat evaluate`: one subcommand for each evaluation; each stands in the `command.py` of its folder."""

from __future__ import annotations

from typing import Any

from nextlat_dist.evaluation.belief.command import add_command as add_belief
from nextlat_dist.evaluation.lm.command import add_command as add_lm
from nextlat_dist.evaluation.probes.command import add_command as add_probes
from nextlat_dist.evaluation.speculative.command import add_command as add_speculative
from nextlat_dist.evaluation.tasks.command import add_command as add_task

KINDS = (add_speculative, add_task, add_belief, add_probes, add_lm)


def add_command(commands: Any) -> None:
    evaluate = commands.add_parser("evaluate", help="measure an export")
    kinds = evaluate.add_subparsers(required=True, metavar="WHAT")
    for add_kind in KINDS:
        add_kind(kinds)
