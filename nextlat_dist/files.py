"""Files and folders that exist completely or not at all, and what the files of a run are called.

    write_whole(path, text_or_bytes)
    with whole_file(path) as file: ...          the same for what is written piece by piece
    with whole_path(path) as temporary: ...     the same for a library that wants a name
    with whole_folder(path) as temporary: ...   the same for a folder

Invariant: until the bytes are on disk they live under a hidden temporary name in the same folder; an error, Ctrl-C or a
killed process never leaves anything under the final name, and what stood there before is there still.
A device, a pipe or an open file (/dev/stdout, /dev/fd/3) is written to and never replaced: a regular file renamed onto
a device node would take the device away from the whole machine. A symbolic link stays, its target is replaced.
What the system refuses to write is the user's to repair (a full disk, no access): CannotWriteError says it in a
sentence.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nextlat_dist.errors import UserError

# The files of a run's output directory.
METRICS_FILE = "metrics.jsonl"
BATCH_HASHES_FILE = "batch_hashes.jsonl"
CONFIG_FILE = "config.yaml"  # the resolved config; in every checkpoint too
CHECKPOINTS_FOLDER = "checkpoints"
CHECKPOINT_NAME = re.compile("step_([0-9]+)")  # any other folder next to checkpoints is the user's
RUN_LOCK_FILE = "run.lock"  # which run writes there; gone after a clean end
EXPORT_FOLDER = "export"
EXPORT_REPORT_FILE = "export_report.json"  # in the export
SPECULATIVE_REPORT_FILE = "speculative.json"  # of `nextlat evaluate speculative`
RUN_REPORT_FILE = "report.json"
RUN_REPORT_PAGE = "report.md"
# Of a checkpoint, next to the tensors.
TRAINER_STATE_FILE = "trainer_state.json"
TOKENIZER_FILE = "tokenizer.model"  # of datasets and exports too


class CannotWriteError(UserError, OSError):
    """The system refused to write `path`; `errno` and `strerror` are what it said."""

    def __init__(self, path: Path, refused: OSError) -> None:
        reason = refused.strerror or str(refused)
        super().__init__(f"{path} cannot be written ({reason}); make room there or repair the access, or name another")
        self.errno, self.strerror = refused.errno, reason

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that only writes `path`, or what lies in it.

    Raises:
        CannotWriteError: the system refused.
    """
    try:
        yield
    except CannotWriteError:
        raise
    except OSError as refused:
        raise CannotWriteError(path, refused) from refused


def temporary_name(path: Path) -> Path:
    """Where `path` is written until it is whole: hidden, in the same folder, the same for every writer."""
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write `content` to `path`, all of it or nothing. Makes the folder.

    Args:
        durable: flush to disk, so that it also survives a power failure; leave that out for what is written every
            second and worth nothing afterwards.

    Raises:
        CannotWriteError: the system refused; what stood there is there still.
    """
    with whole_file(path, durable=durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A new binary file, open for reading and writing, that becomes `path` at the end of the block; an error removes
    it. For a device or a pipe: that, open for writing alone. The block only writes the file.

    Raises:
        CannotWriteError: as `write_whole`.
    """
    if is_written_through(path):
        with writing(path), path.open("ab") as device:
            yield device
        return
    with whole_path(path, durable=durable) as temporary, temporary.open("w+b") as file:
        yield file


@contextmanager
def whole_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The name of a file to write, which becomes `path` at the end of the block; an error removes it. The block only
    writes the file.

    Raises:
        CannotWriteError: as `write_whole`.
    """
    with writing(path):
        if is_written_through(path):
            yield path
            return
        if path.is_dir():  # "." too, which has no name to make a temporary one of
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path = Path(os.path.realpath(path)) if path.is_symlink() else path
        make_folder(path.parent, durable=durable)
        temporary = temporary_name(path)
        try:
            yield temporary
            if durable:
                fsync_path(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            fsync_path(path.parent)


def is_written_through(path: Path) -> bool:
    """Whether `path` is a device, a pipe, a socket or the name of an open file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing there
        return False
    # /dev/stdout and /dev/fd/3 are links into /proc, to what is open; a link of the user's may lead there too.
    name = path.absolute()
    while name.is_symlink():
        name = Path(os.path.realpath(name.parent)) / name.name
        if name.parts[1] == "proc":
            return True
        name = name.parent / os.readlink(name)
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def make_folder(path: Path, *, durable: bool = True) -> None:
    """Make a folder, and those above it, and flush the names of the new ones to disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing) if durable else ():
        fsync_path(folder.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new, empty folder that becomes `path` at the end of the block, in place of an older one; an error removes it,
    and one that was killed is taken over.

    Raises:
        UserError: another process writes the same folder.
        CannotWriteError: the system refused to make it or to give it its name; an older folder is as it was.
    """
    temporary = path.with_name(f".{path.name}.nextlat-tmp")
    with writing(path):
        make_folder(path.parent)
        temporary.mkdir(exist_ok=True)
    with sole_writer(temporary):
        try:
            with writing(path):
                for left in list(temporary.iterdir()):
                    if reason := remove(left):
                        raise OSError(reason)
            yield temporary
            with writing(path):
                flush_folder(temporary)
                publish_folder(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def publish_folder(new: Path, path: Path) -> None:
    """Give the folder `new`, whose content is on disk, the name `path`; an older folder of that name goes afterwards.

    When it fails, and when it is killed at any moment, `path` is the older folder or the new one. Where the file system
    cannot swap two names (NFS), a kill between two renames leaves the older folder as `.NAME.nextlat-old`. A link
    `path` is replaced, not followed.
    """
    older = path.with_name(f".{path.name}.nextlat-old")
    if not os.path.lexists(path):
        os.rename(new, path)
    elif _swap(new, path):
        older = new
    else:
        remove(older)
        os.rename(path, older)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(older, path)
            raise
    fsync_path(path.parent)
    remove(older)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one operation; whether the system and the file system can."""
    exchange = 2  # RENAME_EXCHANGE of linux/fs.h
    here = -100  # AT_FDCWD of fcntl.h
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # not in the C library of every system
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def remove(path: Path) -> str:
    """Remove a file, a link, or a folder with all in it that can be removed; what a link names stays.

    Returns:
        Why something of it is still there; empty if nothing is.
    """
    refused: list[str] = []

    def note(_: Any, where: Any, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            refused.append(f"{getattr(error, 'strerror', None) or error}: {where}")

    if path.is_symlink() or not path.is_dir():
        try:
            path.unlink()
        except OSError as error:
            note(None, path, error)
    elif sys.version_info >= (3, 12):
        shutil.rmtree(path, onexc=note)
    else:
        shutil.rmtree(path, onerror=lambda function, where, caught: note(function, where, caught[1]))
    return refused[0] if refused else ""


def flush_folder(folder: Path) -> None:
    """Flush a folder, and every file and folder in it, to disk."""
    for directory, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(directory) / name)
        fsync_path(Path(directory))


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


def file_sha256(path: Path) -> str:
    """Of the content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


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
