"""A system that refuses: no room in files, no access although root asks; and what was flushed to its disk."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes: what a full disk looks like, for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def disk(directory: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """A file system of this size, mounted; the function mounts it again with other options."""
    directory.mkdir(parents=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(directory)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this needs the privilege to mount a file system: {error}")
    try:
        yield lambda options: mount("-o", f"remount,{options}")
    finally:
        subprocess.run(["umount", str(directory)], check=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@contextmanager
def access_as_written() -> Iterator[None]:
    """Modes of files bind this thread, and those that it starts, as they bind any user: root may do everything."""
    library = ctypes.CDLL(None, use_errno=True)
    header, before = _Header(0x20080522, 0), (_Capabilities * 2)()
    assert library.capget(ctypes.byref(header), before) == 0
    now = (_Capabilities * 2)(*before)
    now[0] = _Capabilities(before[0].effective & ~0b111, before[0].permitted, before[0].inheritable)  # CHOWN, DAC_…
    assert library.capset(ctypes.byref(header), now) == 0
    try:
        yield
    finally:
        assert library.capset(ctypes.byref(header), before) == 0


class Flushes:
    """Notes what is flushed, and checks at every rename that what gets its name is on disk, all files and all folders,
    and that the name that was given before is on disk too. From its making on; `patch` ends it.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.renamed: list[str] = []
        self._flushed: dict[int, object] = {}  # inode → state when it was flushed
        self._new_names: dict[int, Path] = {}  # inode → folder, of the last rename, until it is flushed
        for name in ("rename", "replace"):
            patch.setattr(os, name, self._checked(getattr(os, name)))
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            inode = os.fstat(descriptor).st_ino
            self._flushed[inode] = _state(path)
            self._new_names.pop(inode, None)

        patch.setattr(os, "fsync", noted)

    def _checked(self, original: Any) -> Any:
        def rename(source: Path, target: Path) -> None:
            self.assert_on_disk(Path(source))
            self.assert_names_on_disk()
            original(source, target)
            self.renamed.append(Path(target).name)
            folder = Path(target).parent
            self._new_names[folder.stat().st_ino] = folder

        return rename

    def assert_on_disk(self, path: Path) -> None:
        """That `path`, and all in it, did not change since it was flushed."""
        for found in (path, *path.rglob("*")):
            assert self._flushed.get(found.stat().st_ino) == _state(found), f"{found} is not on disk"

    def assert_names_on_disk(self) -> None:
        """That the folder of everything that was renamed was flushed after it."""
        assert not self._new_names, f"a rename in {self._new_names} is not on disk"


def _state(path: Path) -> object:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, sorted(os.listdir(path)) if path.is_dir() else None
