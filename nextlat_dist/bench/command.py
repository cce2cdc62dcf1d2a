"""The command line of a benchmark: --json and --quick; its report is published, or one sentence says what is wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from nextlat_dist.errors import UserError
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.options import add_outputs
from nextlat_dist.reporting.publish import publish
from nextlat_dist.reporting.report import Report


def run(
    command: str,
    description: str,
    measure: Callable[[argparse.Namespace], Report],
    arguments: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Parse, measure, publish; the exit code.

    Args:
        measure: from the options, of which `quick` is one.
        arguments: None: those of the process.
        add_options: adds the benchmark's own.
    """
    parser = argparse.ArgumentParser(prog=command, description=description)
    add_options(parser)
    add_outputs(parser)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that it runs, measures nothing well")
    options = parser.parse_args(arguments)
    try:
        report = measure(options)
    except (UserError, OSError) as error:
        say(f"error: {error}", error=True)
        return 2
    publish(report, options.json)
    return 0
