"""Walks the parsers of commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator


def leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Commands without commands of their own."""
    kinds = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for kind in kinds:
        for command, inner in kind.choices.items():
            yield from leaves(inner, f"{name} {command}")
    if not kinds:
        yield name, parser


def undescribed(parser: argparse.ArgumentParser) -> list[str]:
    """Arguments without help, and options with a value that may be left out and do not say what holds then."""
    found = []
    for action in parser._actions:
        optional = action.option_strings and not action.required and action.nargs != 0
        if not action.help or (optional and "default" not in action.help):
            found.append(action.dest)
    return found
