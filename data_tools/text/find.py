"""Find the files of folders and globs: the same ones whichever way they are named.

Invariant: links are followed, as `find -L` does, and a folder that contains itself through a link is entered once.
What is left out (broken links, loops, hidden files, pipes, devices, what cannot be opened) is named. Names are relative
to the input and fit into every report: bytes that are not UTF-8, and control characters, are written as escapes.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase, translate
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.reporting.console import printable

STDIN = "-"
IGNORED_FOLDER = "__pycache__"
NAMED = 5  # of each kind of what was left out


@dataclass(frozen=True)
class SourceFile:
    """A file to read (`path` None: standard input) and its name relative to the input it came from."""

    path: Path | None
    name: str
    in_folder: bool = False


@dataclass
class FoundFiles:
    """The files of all inputs, in order; `left_out` is {reason: names}."""

    files: list[SourceFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(printable(name, keep=""))

    def describe(self) -> str:
        """What was left out, in one line; empty when nothing was."""
        kinds = []
        for reason, names in self.left_out.items():
            more = ", …" if len(names) > NAMED else ""
            kinds.append(f"{len(names):,} {reason} ({', '.join(names[:NAMED])}{more})")
        return f"left out: {'; '.join(kinds)}" if kinds else ""


def find_inputs(inputs: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> FoundFiles:
    """Files of the inputs (folder, glob, file or `-`), in the order of the inputs, sorted inside each.

    `include` and `exclude` are patterns for the files of folders and globs; a pattern matches the relative path or any
    part of it. A folder that a glob matches stands for its files. Hidden files and `__pycache__` are left out.

    Raises:
        UserError: an input does not exist or has no file.
    """
    result = FoundFiles()
    for given in inputs:
        if given == STDIN:
            result.files.append(SourceFile(None, "stdin"))
            continue
        path = Path(os.path.expanduser(given))
        if path.is_file():
            result.files.append(SourceFile(path, printable(path.name, keep="")))
            continue
        if path.exists() and not path.is_dir():
            raise UserError(f"input {given} is a pipe or a device; give its content on standard input: --input {STDIN}")
        root, found = _find(path, result)
        relative = sorted((file.relative_to(root).as_posix(), file) for file in found)
        kept = [
            SourceFile(file, printable(name, keep=""), in_folder=True)
            for name, file in relative
            if (not include or _matches(name, include)) and not _matches(name, exclude)
        ]
        if not kept:
            why = "has no file left after --glob and --exclude" if found else "does not exist or has no file"
            raise UserError(f"input {given} {why}; change --input")
        result.files += kept
    return result


def find_files(inputs: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[SourceFile]:
    """The files alone of `find_inputs`."""
    return find_inputs(inputs, include, exclude).files


def _find(given: Path, result: FoundFiles) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of a folder or a glob."""
    if given.is_dir():
        walk = _Walk(given, result)
        return given, list(walk.files(given))
    parts = given.parts
    fixed = next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = Path(*parts[:fixed])
    walk = _Walk(root, result)
    found: dict[Path, None] = {}
    for match in walk.matches(root, parts[fixed:]) if root.is_dir() else ():
        found.update(dict.fromkeys(walk.files(match) if match.is_dir() else [match]))
    return root, list(found)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, *name.split("/")))


class _Walk:
    """Reads folders below `root`, through links, each chain of folders without a repetition."""

    def __init__(self, root: Path, result: FoundFiles) -> None:
        self._root, self._result = root, result
        self._seen: set[tuple[str, Path]] = set()

    def files(self, folder: Path) -> Iterator[Path]:
        """All files at any depth below the folder."""
        for path, is_folder in self._entries(folder, hidden=False):
            if is_folder:
                yield from self.files(path)
            else:
                yield path

    def matches(self, folder: Path, pattern: Sequence[str]) -> Iterator[Path]:
        """Files and folders that match the parts of a pattern; `**` stands for any folders, none too."""
        first, *rest = pattern
        if first == "**":
            if rest:
                yield from self.matches(folder, rest)
            for path, is_folder in self._entries(folder, hidden=False):
                if is_folder:
                    yield from self.matches(path, pattern)
                elif not rest:
                    yield path
            return
        matcher = re.compile(translate(first))
        for path, is_folder in self._entries(folder, hidden=first.startswith("."), wanted=matcher):
            if not rest:
                yield path
            elif is_folder:
                yield from self.matches(path, rest)

    def _entries(
        self, folder: Path, *, hidden: bool, wanted: re.Pattern[str] | None = None
    ) -> Iterator[tuple[Path, bool]]:
        """(path, whether it is a folder) of what is in a folder, in order of the names; the rest is left out."""
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            self._leave_out(f"folders that cannot be opened ({error.strerror})", folder)
            return
        for name in names:
            path = folder / name
            if wanted is not None and not wanted.fullmatch(name):
                continue
            if name == IGNORED_FOLDER or (name.startswith(".") and not hidden):
                self._leave_out("hidden files and folders", path)
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                self._leave_out("broken links" if path.is_symlink() else f"files ({error.strerror})", path)
                continue
            if stat.S_ISDIR(mode):
                if path.is_symlink() and self._is_loop(path):
                    self._leave_out("links to a folder that they are in", path)
                else:
                    yield path, True
            elif stat.S_ISREG(mode):
                yield path, False
            else:
                self._leave_out("pipes, sockets and devices", path)

    def _is_loop(self, link: Path) -> bool:
        """Whether the folder that the link leads to is one of those that led to the link."""
        target = link.resolve()
        above = link.parent
        while True:
            if above.resolve() == target:
                return True
            if above in (self._root, above.parent):
                return self._root.resolve().is_relative_to(target)
            above = above.parent

    def _leave_out(self, reason: str, path: Path) -> None:
        if (reason, path) not in self._seen:
            self._seen.add((reason, path))
            self._result.leave_out(reason, path.relative_to(self._root).as_posix())
