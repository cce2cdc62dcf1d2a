"""Publishing a report: its text on the console, its JSON in a file, its pictures and pages in a directory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.files import write_whole
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.options import add_outputs
from nextlat_dist.reporting.report import Report, write_json


def run_benchmark(
    command: str,
    description: str,
    measure: Callable[[argparse.Namespace], Report],
    arguments: Sequence[str] | None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Parse, measure, publish; the exit code. What cannot be measured is one sentence.

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


def publish(report: Report, json_path: Path | None = None, picture_dir: Path | None = None) -> None:
    """Say the text, then write what was asked for."""
    if report.text:
        say(report.text)
    for remark in report.remarks:
        say(remark, error=True)
    if json_path is not None:
        write_json(json_path, report.content())
    if picture_dir is not None:
        write_pictures(report, picture_dir)


def write_pictures(report: Report, directory: Path) -> None:
    """Every picture and page of the report, by its name."""
    from nextlat_dist.reporting.pictures import save_picture

    for name, draw in report.pictures.items():
        save_picture(draw(), directory / name)
    for name, text in report.pages.items():
        write_whole(directory / name, text)
