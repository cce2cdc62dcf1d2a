"""The folder that an export may be written to: a new one, or that of an older export to which nothing was added.

An export's report lists the files that were written with it and their sha256. A folder that holds anything else, or one
of them changed, is refused: another model, notes, an adapter, weights that were trained further.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.files import EXPORT_REPORT_FILE, TOKENIZER_FILE, file_sha256
from nextlat_dist.huggingface.base import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, load_base_weights, weights_sha256
from nextlat_dist.huggingface.drafters.format import CALIBRATION_FILE, DRAFT_VOCABULARY_FILE

LISTED = "files"  # of the report: {relative name: sha256}
WRITTEN_LATER = {CALIBRATION_FILE, DRAFT_VOCABULARY_FILE}  # into a drafter's folder, by `nextlat calibrate`
# Of exports whose report has no list yet.
ROOT_FILES = {WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE, "generation_config.json", EXPORT_REPORT_FILE}
ROOT_FILES |= {TOKENIZER_FILE, "tokenizer.json", "tokenizer_config.json"}


def destination(output: Path) -> Path:
    """The folder that an export to `output` gets its name from, links followed.

    Raises:
        UserError: there is something that no export wrote, or that cannot be replaced as a whole.
    """
    folder = Path(os.path.realpath(output))
    if not os.path.lexists(folder):
        return folder
    if not os.path.isdir(folder):
        raise UserError(f"{output} is no folder, and an export is one; choose another --output")
    try:
        if _is_mount_point(folder):
            raise UserError(
                f"{output} is a mount point, which cannot be replaced as a whole; name a folder in it: --output "
                f"{output / 'export'}"
            )
        if Path.cwd().is_relative_to(folder):
            raise UserError(
                f"{output} holds the current folder, which cannot be replaced; name a folder in it: --output "
                f"{output / 'export'}"
            )
        reason = _added(folder) if os.listdir(folder) else ""
    except OSError as error:
        raise UserError(f"{output} cannot be read ({error}); choose another --output") from None
    if reason:
        raise UserError(f"{output} exists and {reason}, so it will not be replaced; choose another --output")
    return folder


def listed(export: Path) -> dict[str, str]:
    """{relative name: sha256} of every file of an export that is about to get its report."""
    return {name: file_sha256(export / name) for name in sorted(_names(export))}


def _names(folder: Path) -> Iterator[str]:
    """Relative names of all files, links and empty folders in it."""
    for directory, folders, files in os.walk(folder):
        here = Path(directory)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in (*files, *links):
            yield (here / name).relative_to(folder).as_posix()
        if here != folder and not files and not folders:
            yield here.relative_to(folder).as_posix()


def _added(folder: Path) -> str:
    """What the folder holds that the report in it does not vouch for; empty for an export as it was written."""
    report = _report(folder / EXPORT_REPORT_FILE)
    if "base_weights_sha256" not in report:
        return f"is not an export: it has no {EXPORT_REPORT_FILE} of `nextlat export`"
    if not isinstance(report.get(LISTED), dict):
        return _added_to_older(folder, str(report["base_weights_sha256"]))
    known: dict[str, Any] = report[LISTED]
    drafters = {Path(name).parent for name in known} - {Path()}
    for name in sorted(_names(folder)):
        path = folder / name
        later = path.name in WRITTEN_LATER and Path(name).parent in drafters
        if name == EXPORT_REPORT_FILE or (later and not path.is_symlink()):
            continue
        if name not in known or path.is_symlink() or not path.is_file():
            return f"holds {name}, which no export wrote"
        if file_sha256(path) != known[name]:
            return f"holds another {name} than was exported"
    return ""


def _added_to_older(folder: Path, base_sha256: str) -> str:
    """The same for an export of an earlier release, by its names and its weights."""
    for name in sorted(_names(folder)):
        path = Path(name)
        # A drafter names the base that it was trained with.
        of_drafter = path.name in {WEIGHTS_FILE, CONFIG_FILE, *WRITTEN_LATER} and len(path.parts) == 2
        if of_drafter and _report(folder / path.parent / CONFIG_FILE).get("base_weights_sha256") == base_sha256:
            continue
        if name not in ROOT_FILES or (folder / name).is_symlink():
            return f"holds {name}, which no export wrote"
    try:
        same = weights_sha256(load_base_weights(folder)) == base_sha256
    except (UserError, OSError, ValueError, KeyError, TypeError):  # damaged: then it is not what was exported, either
        same = False
    return "" if same else f"holds another {WEIGHTS_FILE} than was exported"


def _report(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # not there, damaged, not ours
        content = None
    return content if isinstance(content, dict) else {}


def _is_mount_point(folder: Path) -> bool:
    if os.path.ismount(folder):
        return True
    try:  # a folder bound to another of the same disk looks like any other
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    # The fifth word; blanks in it are octal escapes.
    return any(line.split()[4].decode("unicode_escape").encode("latin1") == os.fsencode(folder) for line in lines)
