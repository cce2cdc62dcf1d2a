"""Exports to compare: `--export gpt=DIR nextlat=DIR nextlat=DIR`. Several directories of one name are its runs (seeds).

A directory without a name has its own, or its parent's where it is called `export`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.files import EXPORT_FOLDER


@dataclass(frozen=True)
class NamedExport:
    """`run` counts the exports of one name, from 0."""

    name: str
    run: int
    path: Path


def add_exports(parser: argparse.ArgumentParser) -> None:
    """The option --export of commands that compare; `named_exports` reads it."""
    parser.add_argument(
        "--export",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="directories that `nextlat export` wrote; those of one NAME are runs (seeds) of it",
    )


def named_exports(texts: Sequence[str]) -> list[NamedExport]:
    """From `[name=]DIR` each, in the order given.

    Raises:
        UserError: none, an empty name, or two directories whose own names are the same.
    """
    if not texts:
        raise UserError("no export was given; name at least one with --export")
    found: list[NamedExport] = []
    unnamed: set[str] = set()
    counts: Counter[str] = Counter()
    for text in texts:
        name, equals, directory = text.partition("=")
        named = bool(equals) and "/" not in name and not Path(text).exists()
        if named and not (name and directory):
            raise UserError(f"--export {text!r} has no name or no directory; write it as name=DIR")
        path = Path(directory if named else text)
        if not named:
            name = path.resolve().parent.name if path.name == EXPORT_FOLDER else path.resolve().name
            if name in counts:
                raise UserError(f"two exports are called {name!r}; tell them apart with --export name=DIR")
            unnamed.add(name)
        elif name in unnamed:
            raise UserError(f"two exports are called {name!r}; name both, with --export name=DIR")
        found.append(NamedExport(name, counts[name], path))
        counts[name] += 1
    return found
