"""The configurations and launch scripts that come with the package, in a checkout and in an installed wheel.

A name is a path below configs/ without its ending (`quickstart`, `cpu/hmm`), a launch script (`launch/torchrun.sh`), or
a folder of either (`paper`, `launch`).
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import nextlat_dist
from nextlat_dist.errors import UserError
from nextlat_dist.files import whole_folder, whole_path, writing

FOLDERS = ("configs", "launch")


def shipped_root() -> Path:
    """The directory that holds configs/ and launch/: the wheel's own data, else the checkout.

    Raises:
        UserError: neither is there.
    """
    package = Path(nextlat_dist.__file__).resolve().parent
    for root in (package / "_shipped", package.parent):
        if all((root / folder).is_dir() for folder in FOLDERS):
            return root
    raise UserError(f"{package} has no configs with it; install the wheel again, or use a checkout")


def shipped_configs() -> dict[str, Path]:
    """Name → file of every configuration, runs and grids of runs."""
    root = shipped_root() / "configs"
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}


def shipped_files() -> dict[str, Path]:
    """Name → file of everything that is shipped."""
    root = shipped_root()
    scripts = sorted(path for path in (root / "launch").rglob("*") if path.is_file())
    return shipped_configs() | {str(path.relative_to(root)): path for path in scripts}


def first_comment(path: Path) -> str:
    """The first sentence of the comment that a shipped file begins with."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words += [] if line.startswith(("#!", "# shellcheck")) else line.removeprefix("#").split()
        if words and words[-1][-1] in ".:?":
            break
    text = " ".join(words)
    ends = [text.find(mark) for mark in (". ", ": ", "? ") if mark in text]
    return text[: min(ends) + 1 if ends else len(text)].rstrip(":")


def shipped_path(name: str) -> Path:
    """The file or folder of a name, with or without `configs/` and `.yaml`. Raises UserError for an unknown one."""
    wanted = name.strip("/").removeprefix("configs/").removesuffix(".yaml")
    files = shipped_files()
    if wanted in files:
        return files[wanted]
    if any(known.startswith(f"{wanted}/") for known in files):
        root = shipped_root()
        return next(folder for folder in (root / wanted, root / "configs" / wanted) if folder.is_dir())
    (nearest,) = difflib.get_close_matches(wanted, files, n=1, cutoff=0.0)
    raise UserError(f"no shipped config is named {name!r}, the nearest is {nearest!r}; `nextlat configs` lists them")


def copy_shipped(name: str, output: Path) -> None:
    """Copy a shipped file, or a folder of them, to `output`. Raises UserError where something is there already."""
    source = shipped_path(name)
    if output.exists():
        raise UserError(f"--output {output} exists, it must be a new file; name another or remove it")
    with writing(output):
        if source.is_dir():
            with whole_folder(output) as temporary:
                shutil.copytree(source, temporary, dirs_exist_ok=True)
        else:
            with whole_path(output) as copy:
                shutil.copy(source, copy)
