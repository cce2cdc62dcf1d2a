"""Publishing a report: its text on the console, its JSON in a file, its pictures and pages in a directory."""

from __future__ import annotations

from pathlib import Path

from nextlat_dist.files import write_whole
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.report import Report, write_json


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
