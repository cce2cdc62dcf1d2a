"""The kinds of drafters: this package's own, and those that installed distributions bring.

    drafter_kind("mtp")
    find_drafter(export, base_sha256)        what drafts in an export, of whatever kind

An installed distribution brings a kind with an entry point of the group `nextlat_dist.drafters`, named as the kind,
that is a `DrafterKind`. An export names a kind only, by a folder's name: nothing that lies in an export is imported.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.huggingface.drafters.format import CONFIG_FILE, DrafterKind, StoredDrafter, load_drafter
from nextlat_dist.huggingface.drafters.jtp import JTP
from nextlat_dist.huggingface.drafters.latent_predictor import LATENT_PREDICTOR
from nextlat_dist.huggingface.drafters.mtp import MTP
from nextlat_dist.huggingface.stored import read_fields

GROUP = "nextlat_dist.drafters"
BUILT_IN = {kind.name: kind for kind in (LATENT_PREDICTOR, MTP, JTP)}


def drafter_kind(name: str, *, outside: Path | None = None) -> DrafterKind:
    """The kind of that name.

    Args:
        outside: a directory whose distributions do not count as installed.

    Raises:
        UserError: neither this package nor an installed distribution brings it.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    installed = {entry.name: entry for entry in entry_points(group=GROUP) if not _lies_in(entry, outside)}
    if name not in installed:
        known = ", ".join([*BUILT_IN, *sorted(installed)])
        raise UserError(
            f"there is no drafter kind {name!r}; this package and the installed distributions bring {known}"
        )
    kind = installed[name].load()
    if not isinstance(kind, DrafterKind) or kind.name != name:
        raise UserError(
            f"the entry point {name} of group {GROUP} is {installed[name].value}, but that is no DrafterKind of this "
            "name; correct the distribution that brings it"
        )
    return kind


def _lies_in(entry: EntryPoint, directory: Path | None) -> bool:
    """Whether the distribution of an entry point lies in `directory`, which may be the working directory."""
    if directory is None or entry.dist is None:
        return False
    return Path(str(entry.dist.locate_file(""))).resolve().is_relative_to(directory.resolve())


def find_drafter(export: Path, base_sha256: str, base: LlamaConfig | None = None) -> StoredDrafter | None:
    """What drafts for the base weights in `export`; None if nothing does. A built-in kind comes before the others.

    Raises:
        UserError: as `load_drafter`, or the export has drafters of unknown kinds only.
    """
    names = _named_kinds(export)
    if not names:
        return None
    try:
        kind = drafter_kind(names[0], outside=export)
    except UserError as error:
        raise UserError(
            f"{export / names[0]} cannot be used: {error}; install the distribution that brings it (nothing in an "
            "export is ever imported), or remove that folder"
        ) from None
    return load_drafter(export, kind, base_sha256, base)


def _named_kinds(export: Path) -> list[str]:
    """The folders of `export` that hold drafters, built-in kinds first."""
    own = [name for name in BUILT_IN if (export / name).is_dir()]
    others = [path.parent.name for path in export.glob(f"*/{CONFIG_FILE}") if path.parent.name not in BUILT_IN]
    return own + sorted(name for name in others if _says_it_drafts(export / name / CONFIG_FILE))


def _says_it_drafts(config: Path) -> bool:
    try:
        return "speculators_config" in read_fields(config, "").values
    except UserError:  # somebody else's file
        return False
