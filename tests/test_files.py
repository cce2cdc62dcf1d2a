"""Files that are whole or not there, devices and pipes that are never replaced, and one writer at a time."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nextlat_dist import files
from nextlat_dist.errors import UserError
from nextlat_dist.files import append_durably, sole_writer, temporary_name, whole_file, whole_path, write_whole


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


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_whole(tmp_path / "folder", "content")
    assert names(tmp_path) == ["folder"]


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
