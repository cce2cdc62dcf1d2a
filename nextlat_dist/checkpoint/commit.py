"""A checkpoint exists or it does not.

    checkpoints/
      latest                  name of the newest committed checkpoint, replaced last, atomically
      step_00000120/          manifest.json lists every other file with its size and sha256, and carries its own digest
      step_00000140.writing/  a save that has not been committed; never read

All ranks write into the temporary directory, flush and digest what they wrote; then rank 0 writes the manifest, renames
the directory and moves the pointer, last. Nothing is opened whose digest does not match the manifest.
Needs no torch import beyond `torch.distributed` for the vote.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from nextlat_dist.errors import UserError
from nextlat_dist.files import (
    CHECKPOINT_NAME,
    CannotWriteError,
    file_sha256,
    fsync_path,
    make_folder,
    publish_folder,
    remove,
    write_durably,
    write_whole,
)
from nextlat_dist.parallel.dims import raise_together
from nextlat_dist.parallel.host_exchange import HostExchange
from nextlat_dist.reporting.log import logger

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"
UNCOMMITTED = ".writing"
_UNCOMMITTED_NAME = re.compile(CHECKPOINT_NAME.pattern + re.escape(UNCOMMITTED))

log = logger(__name__)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def commit(
    root: Path,
    step: int,
    description: dict[str, Any],
    write: Callable[[Path], Sequence[str]],
    exchange: HostExchange | None = None,
) -> None:
    """Let every rank write its files, then make the checkpoint exist. Collective over all ranks.

    Args:
        root: the run's checkpoint directory, on a file system that all ranks share.
        step: names the checkpoint.
        description: JSON-able facts for the manifest (topology, format), the same on every rank.
        write: puts this rank's files into the given directory and returns their relative names.
        exchange: used by nobody else at the time; the default group if None.

    Raises:
        UserError: on every rank, when any of them cannot write; an older checkpoint is as it was.
    """
    first = dist.get_rank() == 0
    final, temporary = root / step_name(step), root / (step_name(step) + UNCOMMITTED)
    files: dict[str, dict[str, Any]] = {}
    try:
        if first:
            _try_together(lambda: _prepare(root, temporary), exchange)
        else:
            _try_together(dict, exchange)
        for part in _try_together(lambda: _written(temporary, write(temporary)), exchange):
            files |= part
        manifest = {"format_version": FORMAT_VERSION, "step": step, **description, "files": dict(sorted(files.items()))}
        _try_together(lambda: _publish(root, temporary, final, manifest) if first else {}, exchange)
    except UserError as error:
        if first:
            _discard(temporary)
        raise UserError(
            f"checkpoint {final} cannot be written ({error}); make room or repair the access: older checkpoints are as "
            "they were",
            shared=True,
        ) from None


def write_alone(root: Path, step: int, description: dict[str, Any], write: Callable[[Path], Sequence[str]]) -> Path:
    """`commit` by a single process without ranks; returns the checkpoint."""
    final, temporary = root / step_name(step), root / (step_name(step) + UNCOMMITTED)
    try:
        _prepare(root, temporary)
        files = _written(temporary, write(temporary))
        manifest = {"format_version": FORMAT_VERSION, "step": step, **description, "files": dict(sorted(files.items()))}
        _publish(root, temporary, final, manifest)
    except (OSError, SafetensorError) as error:
        _discard(temporary)
        raise UserError(
            f"checkpoint {final} cannot be written ({_reason(error)}); make room or repair the access"
        ) from None
    return final


def _try_together(work: Callable[[], dict[str, Any]], exchange: HostExchange | None) -> list[dict[str, Any]]:
    """Every rank's result of its `work`. Collective; raises UserError on all ranks when any rank's raised OSError."""
    result: dict[str, Any] = {}
    error = ""
    try:
        result = work()
    except (OSError, SafetensorError) as caught:
        error = _reason(caught)
    answers: list[tuple[dict[str, Any], str]] = [({}, "")] * dist.get_world_size()
    if exchange is None:
        dist.all_gather_object(answers, (result, error))
    else:
        answers = exchange.gather((result, error))
    for rank, (_, said) in enumerate(answers):
        if said:
            raise UserError(f"rank {rank}: {said}", shared=True)
    return [found for found, _ in answers]


def _reason(refused: OSError | SafetensorError) -> str:
    """What the system said."""
    return f"{refused.strerror}" if isinstance(refused, CannotWriteError) else str(refused)


def _prepare(root: Path, temporary: Path) -> dict[str, Any]:
    make_folder(root)
    _discard(temporary)  # of a save that was stopped
    temporary.mkdir()
    return {}


def _discard(temporary: Path) -> None:
    """Remove an unfinished save; a file or a link of that name is not one."""
    if temporary.is_dir() and not temporary.is_symlink():
        remove(temporary)


def _written(directory: Path, names: Sequence[str]) -> dict[str, Any]:
    """Flush the files to disk; {name: size and sha256}."""
    entries = {}
    for name in names:
        path = directory / name
        fsync_path(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return entries


def _publish(root: Path, temporary: Path, final: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    manifest["digest"] = manifest_digest(manifest)
    write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    for directory in [temporary, *(p for p in temporary.rglob("*") if p.is_dir())]:
        fsync_path(directory)
    # One of this name may be there: damaged, or left by a run that was stopped before the pointer was moved.
    publish_folder(temporary, final)
    write_whole(root / LATEST, final.name + "\n")
    return {}


def prune(root: Path, keep_last: int, keep_every: int = 0, *, abandoned: bool = True) -> dict[str, str]:
    """Delete all committed checkpoints but the newest `keep_last` and those whose step is a multiple of `keep_every`
    (0: none), and what an interrupted deletion left. What the pointer names always stays.

    Only directories named `step_` and digits are touched, and never through a link: others are the user's.

    Args:
        abandoned: delete saves that were never committed, too. Only for whoever writes to `root`: to anybody else a
            save under way looks the same.

    Returns:
        {name: reason} of what could not be deleted.
    """
    try:
        found = list(root.iterdir())  # before anything is chosen: what is committed from here on is not looked at
        pointed = (root / LATEST).read_text().strip()
    except OSError as error:
        return {root.name: f"{error.strerror}: {error.filename}"}
    ours = _checkpoints(found)
    whole = [path for path in ours if has_manifest(path)]
    kept = {*whole[-keep_last:], root / pointed}
    if keep_every:
        kept |= {path for path in whole if step_of(path) % keep_every == 0}
    if abandoned:
        ours += [path for path in found if _UNCOMMITTED_NAME.fullmatch(path.name)]
    refused = {}
    for path in ours:
        if path in kept or path.is_symlink() or not path.is_dir():
            continue
        # The manifest goes first: a deletion cut short leaves no checkpoint that looks whole.
        reason = remove(path / MANIFEST) or remove(path)
        if reason:
            refused[path.name] = reason
    return refused


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint by its name; -1 for a name that no commit gives."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def _checkpoints(paths: Iterable[Path]) -> list[Path]:
    """Those that are named as a commit names them, oldest first, whole or not."""
    return sorted((path for path in paths if step_of(path) >= 0), key=step_of)


def _listed(root: Path) -> list[Path]:
    """`_checkpoints` of what lies in `root`.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return _checkpoints(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{root} cannot be read ({error.strerror}); repair the access to it or name another") from None


def has_manifest(checkpoint: Path) -> bool:
    """Whether it was committed. One that cannot be read counts: whoever opens it will say what is wrong."""
    try:
        return (checkpoint / MANIFEST).is_file()
    except OSError:
        return True


def find_checkpoint(path: Path) -> Path | None:
    """The committed checkpoint that `path` means: itself, or what the pointer in it names, without one the newest; None
    if nothing was ever saved.

    Raises:
        UserError: the save was never committed, the pointer names nothing, or something cannot be read. Never a silent
            start from scratch.
    """
    if path.name.endswith(UNCOMMITTED):
        raise UserError(
            f"{path} is a save that was never committed; use a checkpoint without {UNCOMMITTED} in its name"
        )
    if has_manifest(path):
        return path
    pointer = path / LATEST
    try:
        target = path / pointer.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        log.warning("%s cannot be read (%s); using the newest checkpoint in %s", pointer, error.strerror, path)
    else:
        if not has_manifest(target):
            raise UserError(
                f"{pointer} names {target.name!r}, which is not a committed checkpoint; put the name of a "
                f"directory that has a {MANIFEST} into it"
            )
        return target
    found = committed(path)
    if found:  # the very first save was stopped between its rename and the pointer
        return found[-1]
    for directory in [path, *_listed(path)]:
        if directory.name.startswith("step_") and directory.is_dir():
            raise UserError(
                f"{directory} has no {MANIFEST}: it is half-written and cannot be used; choose another checkpoint or "
                "delete it"
            )
    return None


def committed(root: Path) -> list[Path]:
    """Oldest first. A save that was stopped just before its rename has a manifest too, but not its final name."""
    return [path for path in _listed(root) if has_manifest(path)]


def manifest_digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest's content, its own digest left out."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint.

    Raises:
        UserError: it cannot be read, has another format version, or was edited.
    """
    path = checkpoint / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text())
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} cannot be read; choose another checkpoint")
    if "files" not in manifest and "shards" in manifest:
        raise UserError(
            f"{checkpoint} is a dataset, not a checkpoint; name a run's directory of checkpoints or one of them"
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{checkpoint} has format_version {manifest.get('format_version')}, this release reads {FORMAT_VERSION}"
        )
    if manifest.get("digest") != manifest_digest(manifest):
        raise UserError(
            f"{path} was changed after it was written: its content no longer matches its digest; choose another "
            "checkpoint"
        )
    return manifest


def verify(checkpoint: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Check size and sha256 of every file of the manifest that is `wanted`; return the manifest.

    Raises:
        UserError: the first file that is missing, cut short or altered.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest["files"].items():
        if wanted(name):
            try:
                _verify_file(checkpoint, name, entry)
            except OSError as error:
                raise _unreadable(checkpoint / name, error) from None
    return manifest


def _verify_file(checkpoint: Path, name: str, entry: dict[str, Any]) -> None:
    path = checkpoint / name
    if not path.is_file():
        raise UserError(f"{checkpoint} is half-written: {name} is missing; choose another checkpoint")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise UserError(
            f"{checkpoint} is damaged: {name} has {size} bytes, its manifest says {entry['bytes']}; "
            "choose another checkpoint"
        )
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{checkpoint} is damaged: {name} does not match its sha256; choose another checkpoint")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}); choose another checkpoint")


def verify_together(checkpoint: Path) -> dict[str, Any]:
    """`verify`, the files divided over all ranks; every rank raises if any rank found damage. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()
    error = ""
    manifest: dict[str, Any] = {}
    try:
        names = sorted(read_manifest(checkpoint)["files"])
        mine = set(names[rank::size])
        manifest = verify(checkpoint, mine.__contains__)
    except UserError as caught:
        error = str(caught)
    raise_together(error)
    return manifest
