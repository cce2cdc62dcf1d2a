"""Write files that exist completely or not at all.

Invariant: until the bytes are on disk they live under a hidden temporary name; an error, Ctrl-C or a killed process
never leaves anything under the final name.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nextlat_dist.errors import UserError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; leaving the block flushes it to disk and renames it, an error removes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with opened_directory(path.parent) as directory:
        os.fsync(directory)


@contextmanager
def opened_directory(directory: Path) -> Iterator[int]:
    """A descriptor of a directory."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


class writing_to:
    """Around code that only writes below `directory`: a full disk and the like end with a sentence. Can be used again.

    Raises:
        UserError: the system refused to write.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write to {self._directory} ({error.strerror or error}); make room there or correct that, then "
                "run the same command again: shards that are finished stay valid and are not done again"
            ) from error


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Keep every other process that asks for the same out of `directory`, where its file system has locks.

    Raises:
        UserError: another process is in.
    """
    with opened_directory(directory) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to {directory}; wait for it or stop it, or choose another --output"
            ) from None
        except OSError:
            pass
        yield
