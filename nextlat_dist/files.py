"""Files that exist completely or not at all, and what the files of a run are called.

    write_whole(path, text_or_bytes)
    with whole_file(path) as file: ...          the same for what is written piece by piece
    with whole_path(path) as temporary: ...     the same for a library that wants a name

Invariant: until the bytes are on disk they live under a hidden temporary name in the same folder; an error, Ctrl-C or a
killed process never leaves anything under the final name, and what stood there before is there still.
A device, a pipe or an open file (/dev/stdout, /dev/fd/3) is written to and never replaced: a regular file renamed onto
a device node would take the device away from the whole machine. A symbolic link stays, its target is replaced.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nextlat_dist.errors import UserError

# The files of a run's output directory.
METRICS_FILE = "metrics.jsonl"
BATCH_HASHES_FILE = "batch_hashes.jsonl"
CONFIG_FILE = "config.yaml"  # the resolved config; in every checkpoint too
CHECKPOINTS_FOLDER = "checkpoints"
EXPORT_FOLDER = "export"
EXPORT_REPORT_FILE = "export_report.json"  # in the export
SPECULATIVE_REPORT_FILE = "speculative.json"  # of `nextlat evaluate speculative`
RUN_REPORT_FILE = "report.json"
RUN_REPORT_PAGE = "report.md"
# Of a checkpoint, next to the tensors.
TRAINER_STATE_FILE = "trainer_state.json"
TOKENIZER_FILE = "tokenizer.model"  # of datasets and exports too


def temporary_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, in the same folder, the same for every writer."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write `content` to `path`, all of it or nothing. Makes the folder.

    Args:
        durable: flush to disk, so that it also survives a power failure; leave that out for what is written every
            second and worth nothing afterwards.
    """
    with whole_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new binary file, open for reading and writing, that becomes `path` at the end of the block; an error removes
    it. For a device or a pipe: that, open for writing alone."""
    if _is_written_through(path):
        with path.open("ab") as device:
            yield device
        return
    with whole_path(path, durable=durable) as temporary, temporary.open("w+b") as file:
        yield file


@contextmanager
def whole_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The name of a file to write, which becomes `path` at the end of the block; an error removes it."""
    if _is_written_through(path):
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        if durable:
            fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


def _is_written_through(path: Path) -> bool:
    """Whether `path` is a device, a pipe, a socket or the name of an open file."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there
        return False
    if path.is_symlink() and path.absolute().parts[1] in ("dev", "proc"):  # /dev/stdout: a link to what is open
        return True
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def write_durably(path: Path, content: str) -> None:
    """Write a file of a folder that itself is still under a temporary name, and flush it to disk."""
    with path.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_durably(path: Path, content: bytes) -> None:
    """Append to a journal and flush it to disk. A kill may leave a part of `content`: the reader drops it."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to disk; a rename is on disk only when its folder is."""
    with opened_folder(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """A descriptor of a folder (or file), for reading."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep every other process that asks for the same out of `folder`, where its file system has locks.

    Raises:
        UserError: another process is in.
    """
    with opened_folder(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {folder}; wait for it or stop it, or choose another --output"
            ) from None
        except OSError:
            pass
        yield
