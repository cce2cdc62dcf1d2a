"""`nextlat`: lists the commands, each the `command.py` of its package, and makes exit codes of what they raise.

    nextlat train --config configs/quickstart.yaml [key=value …] [--dry-run]
    nextlat export --checkpoint runs/NAME/checkpoints --output DIR
    nextlat fit-drafter --model DIR --data DATASET --output DIR
    nextlat calibrate --export DIR --prompts FILE|DIR …
    nextlat generate --export DIR --prompt TEXT
    nextlat chat --export DIR
    nextlat evaluate speculative --export [NAME=]DIR … --prompts FILE|DIR …
    nextlat evaluate task --export NAME=DIR … --data DIR
    nextlat evaluate belief --export NAME=DIR … --data DIR
    nextlat evaluate probes --export NAME=DIR … --data DIR
    nextlat evaluate lm --export NAME=DIR …
    nextlat ablate --config GRID --output DIR
    nextlat experiments field --scale cpu --output DIR
    nextlat experiments price --scale cpu --output DIR
    nextlat report --run runs/NAME
    nextlat init [--preset NAME] [--output FILE]
    nextlat configs [NAME --output FILE]
    nextlat checkpoint list | verify | prune | reshape runs/NAME/checkpoints
    nextlat doctor [--config FILE] [--hostfile FILE]

A user's mistake is one sentence on stderr and exit status 2. A training run that was asked to stop and saved exits with
75, one whose rank stalled or died with 76: the same command resumes from the last checkpoint. Heavy imports happen
inside the commands.
"""

from __future__ import annotations

import sys

from nextlat_dist import __version__
from nextlat_dist.calibration.command import add_command as add_calibrate
from nextlat_dist.checkpoint.command import add_command as add_checkpoint
from nextlat_dist.config.command import add_command as add_configs
from nextlat_dist.doctor.command import add_command as add_doctor
from nextlat_dist.errors import UserError, refused_path
from nextlat_dist.evaluation.command import add_command as add_evaluate
from nextlat_dist.evaluation.run_report.command import add_command as add_report
from nextlat_dist.experiments.command import add_command as add_ablate
from nextlat_dist.fitting.command import add_command as add_fit_drafter
from nextlat_dist.huggingface.command import add_command as add_export
from nextlat_dist.inference.command import add_command as add_decoding
from nextlat_dist.parallel.environment import is_first_rank
from nextlat_dist.reporting.console import say, say_error
from nextlat_dist.reporting.options import CommandParser
from nextlat_dist.training.command import add_command as add_train
from nextlat_dist.training.health.signals import EXIT_STOPPED, StoppedBySignal


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run_command(options)
        status = 0
    except (UserError, OSError) as found:
        error = found if isinstance(found, UserError) else refused_path(found, arguments or sys.argv[1:])
        if error is None:
            raise
        # Before ranks meet, and when they agreed on it, every rank has the same error: one of them speaks.
        if is_first_rank() or (_ranks_have_met() and not error.shared):
            say_error(parser.in_flags(str(error)))
        status = 2
    except StoppedBySignal as stopped:
        if is_first_rank():
            say(str(stopped), error=True)
        status = EXIT_STOPPED
    except KeyboardInterrupt:
        say("interrupted", error=True)
        status = 130
    return status


def _ranks_have_met() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized()


def _parser() -> CommandParser:
    parser = CommandParser(prog="nextlat", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--version", action="version", version=f"nextlat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_train(commands)
    add_export(commands)
    add_fit_drafter(commands)
    add_calibrate(commands)
    add_decoding(commands)
    add_evaluate(commands)
    add_ablate(commands)
    add_configs(commands)
    add_doctor(commands)
    add_checkpoint(commands)
    add_report(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
