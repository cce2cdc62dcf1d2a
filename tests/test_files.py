"""Files that are whole or not there, devices and pipes that are never replaced, and one writer at a time."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nextlat_dist import files
from nextlat_dist.errors import UserError
from nextlat_dist.files import (
    CannotWriteError,
    append_durably,
    remove,
    sole_writer,
    temporary_name,
    whole_file,
    whole_folder,
    whole_path,
    write_whole,
)
from tests.kit.system import Flushes, access_as_written, files_up_to


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("content", ["text ⟦é⟧\n", b"\0bytes"])
def test_content_arrives_and_nothing_else_is_left(tmp_path: Path, content: str | bytes, durable: bool) -> None:
    path = tmp_path / "new" / "file"
    write_whole(path, "longer than what follows, and gone", durable=durable)
    write_whole(path, content, durable=durable)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_text("before")

    def fail_in_file() -> None:
        with whole_file(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    def fail_in_path() -> None:
        with whole_path(tmp_path / "other") as temporary:
            temporary.write_text("half")
            raise error

    for fail in (fail_in_file, fail_in_path):
        with pytest.raises(type(error)):
            fail()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def killed_before(operation: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed before its n-th opening, flushing to disk or renaming of a file."""
    child = os.fork()
    if child == 0:
        left = iter(range(operation))

        def count(name: str, _: object) -> None:
            if name in ("open", "os.rename", "fsync") and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        fsync = os.fsync
        os.fsync = lambda descriptor: (sys.audit("fsync"), fsync(descriptor))[1]  # type: ignore[assignment]
        sys.addaudithook(count)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_the_file_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    for operation in range(20):
        path.write_text("old")
        killed = killed_before(operation, lambda: write_whole(path, "new"))
        seen.append(path.read_text())
        assert set(names(tmp_path)) <= {"file", temporary_name(path).name}
        if not killed:
            break
    assert len(seen) >= 5
    assert seen == sorted(seen, key=["old", "new"].index)
    assert names(tmp_path) == ["file"], "the next write takes over what a killed one left"


def test_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(name: str, original: Callable[..., object]) -> Callable[..., object]:
        return lambda *given: (done.append(name), original(*given))[1]

    monkeypatch.setattr(files, "fsync_path", lambda path: done.append("folder" if path.is_dir() else path.name))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    write_whole(tmp_path / "file", "content")
    assert done == [".file.tmp", "replace", "folder"]
    done.clear()
    write_whole(tmp_path / "file", "content", durable=False)
    assert done == ["replace"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As root, a file renamed onto a device's path would replace the device for everybody on the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    for write in (
        lambda: write_whole(pipe, "through"),
        lambda: write_whole(pipe, b"through", durable=False),
        lambda: _write_path(pipe),
    ):
        reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
        reader.start()
        write()
        reader.join(10)
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert names(tmp_path) == ["pipe"]
    assert read == [b"through"] * 3


def _write_path(path: Path) -> None:
    with whole_path(path) as temporary:
        temporary.write_text("through")


def test_an_open_file_is_written_to_by_its_name(tmp_path: Path) -> None:
    """/dev/stdout and /dev/fd/N are links to open files: following one and renaming would lose what else is printed."""
    with (tmp_path / "open").open("w+b", buffering=0) as file:
        file.write(b"before, ")
        before = os.fstat(file.fileno()).st_ino
        write_whole(Path(f"/proc/self/fd/{file.fileno()}"), "through")
        file.seek(0)
        assert file.read() == b"before, through"
    assert (tmp_path / "open").stat().st_ino == before
    assert names(tmp_path) == ["open"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    write_whole(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert names(tmp_path / "elsewhere") == ["target"]


def test_a_link_of_the_users_to_an_open_file_is_written_through(tmp_path: Path) -> None:
    """`--json out` where out leads to /dev/stdout, and that into a file: what else was printed there stays."""
    with (tmp_path / "open").open("w+b", buffering=0) as file:
        file.write(b"before, ")
        (tmp_path / "second").symlink_to(f"/proc/self/fd/{file.fileno()}")
        (tmp_path / "first").symlink_to("second")
        write_whole(tmp_path / "first", "through")
        file.seek(0)
        assert file.read() == b"before, through"
    assert names(tmp_path) == ["first", "open", "second"]


def test_a_link_in_shared_memory_is_a_link(tmp_path: Path) -> None:
    """/dev/shm holds files, no devices: a run may lie there."""
    shared = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        (shared / "target").write_text("before")
        (shared / "link").symlink_to(shared / "target")
        write_whole(shared / "link", "after")
        assert (shared / "target").read_text() == "after"
    finally:
        shutil.rmtree(shared)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root")
def test_a_device_stays_a_device(tmp_path: Path) -> None:
    """A node of our own stands in for the null device."""
    os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (tmp_path / "link").symlink_to("null")
    for name in ("null", "link"):
        write_whole(tmp_path / name, "gone")
        _write_path(tmp_path / name)
        with whole_file(tmp_path / name) as file:
            file.write(b"gone")
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    assert names(tmp_path) == ["link", "null"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "content")
    assert names(tmp_path) == ["folder"]


# What the system refuses.


def test_a_refusal_is_a_sentence_and_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("before")
    with files_up_to(1000), pytest.raises(CannotWriteError) as caught:
        write_whole(tmp_path / "file", "x" * 2000)
    assert isinstance(caught.value, UserError)
    assert caught.value.errno == errno.EFBIG
    sentence = f"{tmp_path / 'file'} cannot be written (File too large); make room there or repair the access"
    assert str(caught.value).startswith(sentence)
    assert (tmp_path / "file").read_text() == "before"
    assert names(tmp_path) == ["file"]
    with pytest.raises(CannotWriteError, match="file/inner cannot be written"):
        write_whole(tmp_path / "file" / "inner", "below a file")


def test_a_mistake_of_ours_is_none_of_the_systems(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file"):
        _ = 1 // 0
    assert names(tmp_path) == []


def test_what_cannot_be_removed_is_said_and_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name in ("free", "kept"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    (folder / "free" / "link").symlink_to(tmp_path / "mine")
    (folder / "kept").chmod(0o555)
    with access_as_written():
        assert re.fullmatch(r"Permission denied: .*file", remove(folder))
    assert names(folder) == ["kept"]
    (folder / "kept").chmod(0o755)
    (folder / "kept" / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert [remove(path) for path in (folder, tmp_path / "link", tmp_path / "nothing")] == ["", "", ""]
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["file"]


# Folders.


def write_folder(path: Path, text: str) -> None:
    with whole_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)
        (folder / text).write_text("")


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_folder_killed_at_any_moment_is_the_old_one_or_the_new_one(
    tmp_path: Path, swaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(files, "_swap", lambda *_: False)
    path, seen = tmp_path / "folder", []
    for operation in range(60):
        write_folder(path, "old")
        killed = killed_before(operation, lambda: write_folder(path, "new"))
        aside = tmp_path / ".folder.nextlat-old"
        here = path if path.exists() or swaps else aside  # between two renames
        seen.append((here / "inner" / "file").read_text())
        assert names(here) == sorted(["inner", seen[-1]])
        if not killed:
            break
    assert len(seen) >= 10
    assert seen == sorted(seen, key=["old", "new"].index)
    assert names(tmp_path) == ["folder"], "the next write takes over what a killed one left"


@pytest.mark.parametrize("failing", [1, 2], ids=["first rename", "second rename"])
def test_a_rename_that_fails_loses_no_folder(tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "folder", "old")
    done, rename = iter(range(1, 10)), os.rename

    def refused(source: Path, target: Path) -> None:
        if next(done) == failing:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(files, "_swap", lambda *_: False)
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(CannotWriteError, match="folder cannot be written"):
        write_folder(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushes = Flushes(monkeypatch)
    write_folder(tmp_path / "above" / "folder", "new")
    assert flushes.renamed == ["folder"]
    flushes.assert_on_disk(tmp_path)
    flushes.assert_names_on_disk()


def test_what_a_killed_writer_left_never_becomes_part_of_the_new_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "old")
    left = tmp_path / ".folder.nextlat-tmp" / "left"
    left.mkdir(parents=True)
    (left / "file").write_text("x")
    left.chmod(0o555)
    with access_as_written(), pytest.raises(CannotWriteError, match=r"folder cannot be written \(Permission denied: "):
        write_folder(tmp_path / "folder", "new")
    assert names(tmp_path / "folder") == ["inner", "old"]
    left.chmod(0o755)
    write_folder(tmp_path / "folder", "new")
    assert names(tmp_path / "folder") == ["inner", "new"]
    assert names(tmp_path) == ["folder"]


def test_one_writer_of_a_folder_at_a_time(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("mine")
        with pytest.raises(UserError, match="another process is writing"):
            write_folder(tmp_path / "folder", "other")
    assert names(tmp_path / "folder") == ["file"]


def test_appended_lines_come_after_each_other(tmp_path: Path) -> None:
    append_durably(tmp_path / "journal", b"one\n")
    append_durably(tmp_path / "journal", b"two\n")
    assert (tmp_path / "journal").read_text() == "one\ntwo\n"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another process is writing to")
    with sole_writer(tmp_path), refused, sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path):
        pass


def test_no_torch(tmp_path: Path) -> None:
    code = "import sys, nextlat_dist.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


@pytest.mark.parametrize("name", ["", ".", "folder"])
def test_a_folder_is_no_file_to_write(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--json .` is a sentence, and no temporary file stands next to the folder for a moment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"), whole_path(Path(name)):
        pytest.fail("the block ran")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
