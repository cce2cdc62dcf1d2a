from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zlib import crc32

import pytest

from nextlat_dist.data.storage.cache import COUNT_DIGITS, LOCK_FILE, CacheSettings, RangeCache
from nextlat_dist.errors import UserError

URL = "https://host/a/train-000000.tar"


def piece(number: int, size: int = 100) -> bytes:
    return number.to_bytes(4, "little") * (size // 4)


def put(cache: RangeCache, number: int, size: int = 100) -> None:
    data = piece(number, size)
    cache.put(URL, number, size, crc32(data), data)


def get(cache: RangeCache, number: int, size: int = 100) -> bytes | None:
    return cache.get(URL, number, size, crc32(piece(number, size)))


def kept_files(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*/*") if path.is_file()]


def kept_bytes(directory: Path) -> int:
    total = 0
    for path in kept_files(directory):
        try:
            total += 0 if path.suffix == ".tmp" else path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def counted_bytes(directory: Path) -> int:
    return int((directory / LOCK_FILE).read_bytes())


def test_what_was_put_comes_back_also_to_another_process(tmp_path: Path) -> None:
    cache = RangeCache(CacheSettings(tmp_path / "new" / "cache", 10_000))
    assert get(cache, 1) is None
    put(cache, 1)
    put(cache, 1)
    assert counted_bytes(tmp_path / "new" / "cache") == 100
    for reader in (cache, RangeCache(CacheSettings(tmp_path / "new" / "cache", 10_000))):
        assert get(reader, 1) == piece(1)
        assert get(reader, 2) is None


def test_no_two_ranges_share_a_name(tmp_path: Path) -> None:
    """WebDataset's cache takes the last part of the URL: two shards of one name are one file there."""
    cache = RangeCache(CacheSettings(tmp_path, 10_000))
    keys = [("https://host/a/x.tar", 0, 4), ("https://host/b/x.tar", 0, 4), ("https://host/a/x.tar", 4, 4)]
    keys += [("https://host/a/x.tar", 0, 5)]
    for number, key in enumerate(keys):
        cache.put(*key, crc32(piece(7, 4)), piece(7, 4))
        assert len(kept_files(tmp_path)) == number + 1
    cache.put(*keys[0], crc32(piece(8, 4)), piece(8, 4))
    assert cache.get(*keys[0], crc32(piece(7, 4))) == piece(7, 4)
    assert cache.get(*keys[0], crc32(piece(8, 4))) == piece(8, 4)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_a_damaged_range_is_deleted_and_can_be_put_again(tmp_path: Path, damage: str) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 10_000))
    put(cache, 1)
    (path,) = kept_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes({"flip": bytes(data), "cut": piece(1)[:-1], "empty": b"", "longer": piece(1) + b"\0"}[damage])
    assert get(cache, 1) is None
    assert not path.exists()
    put(cache, 1)
    assert get(cache, 1) == piece(1)


def test_the_ranges_unused_for_longest_go_first_and_the_bound_always_holds(tmp_path: Path) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 1000))
    for number in range(40):
        put(cache, number)
        assert get(cache, number) == piece(number)
        assert get(cache, 0) == piece(0), "range 0 is used all the time"
        assert kept_bytes(tmp_path) <= 1000
        assert kept_bytes(tmp_path) == counted_bytes(tmp_path)
    assert kept_bytes(tmp_path) >= 800
    newest = [number for number in range(1, 40) if get(cache, number) is not None]
    assert newest == list(range(40 - len(newest), 40))


def test_a_range_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 1000))
    put(cache, 1)
    put(cache, 2, 1004)
    assert get(cache, 2, 1004) is None
    assert get(cache, 1) == piece(1)


def test_ranges_of_all_sizes_keep_below_the_bound(tmp_path: Path) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 1000))
    generator = random.Random(0)
    for number in range(200):
        put(cache, number, generator.randrange(4, 1000, 4))
        assert kept_bytes(tmp_path) <= min(1000, counted_bytes(tmp_path))


@pytest.mark.parametrize("count", [b"", b"12", b"x" * COUNT_DIGITS])
def test_a_count_that_is_no_number_is_taken_again(tmp_path: Path, count: bytes) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 1000))
    for number in range(8):
        put(cache, number)
    (tmp_path / LOCK_FILE).write_bytes(count)
    put(cache, 8)
    assert counted_bytes(tmp_path) == kept_bytes(tmp_path) == 900


def test_files_and_directories_deleted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "cache"
    cache = RangeCache(CacheSettings(directory, 1000))
    for number in range(10):
        put(cache, number)
    for path in kept_files(directory)[:5]:
        path.unlink()
    put(cache, 10)
    assert kept_bytes(directory) == counted_bytes(directory) == 600
    subprocess.run(["rm", "-r", str(directory)], check=True)
    assert get(cache, 10) is None
    for _ in range(2):
        put(cache, 11)
    assert get(cache, 11) == piece(11)
    assert capsys.readouterr().err == ""


def test_a_process_stopped_with_the_lock_holds_nobody_up(tmp_path: Path) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 1000))
    put(cache, 1)
    with (tmp_path / LOCK_FILE).open("rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        put(cache, 2)
        assert get(cache, 1) == piece(1)
        assert get(cache, 2) is None
        assert len(kept_files(tmp_path)) == 1
    put(cache, 2)
    assert get(cache, 2) == piece(2)


def _hammer(directory: Path, seed: int, seconds: float) -> None:
    cache, generator, end = (
        RangeCache(CacheSettings(directory, 20_000)),
        random.Random(seed),
        time.monotonic() + seconds,
    )
    while time.monotonic() < end:
        number = generator.randrange(100)
        size = 4 + 16 * number
        if (found := get(cache, number, size)) is None:
            put(cache, number, size)
        else:
            assert found == piece(number, size)


def test_processes_and_threads_share_one_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hammer, args=(tmp_path, seed, 1.5)) for seed in range(3)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(_hammer, tmp_path, 10 + seed, 1.5) for seed in range(2)]
        highest = 0
        while any(process.is_alive() for process in processes):
            # Locked, because a walk that files come and go under counts too many.
            with (tmp_path / LOCK_FILE).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
                highest = max(highest, kept_bytes(tmp_path))
        for thread in threads:
            thread.result()
    assert [process.exitcode for process in processes] == [0] * 3
    assert 10_000 < highest <= 20_000
    assert kept_bytes(tmp_path) <= counted_bytes(tmp_path) <= 20_000
    assert not list(tmp_path.glob("*/*.tmp"))


def test_kill_at_any_point_leaves_a_cache_that_works(tmp_path: Path) -> None:
    context, generator = multiprocessing.get_context("fork"), random.Random(1)
    for seed in range(25):
        process = context.Process(target=_hammer, args=(tmp_path, seed, 60))
        process.start()
        time.sleep(generator.uniform(0.01, 0.06))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (tmp_path / LOCK_FILE).exists() and (tmp_path / LOCK_FILE).stat().st_size:
            assert kept_bytes(tmp_path) <= counted_bytes(tmp_path) <= 20_000
    for path in tmp_path.glob("*/*.tmp"):
        os.utime(path, (0, 0))
    cache = RangeCache(CacheSettings(tmp_path, 20_000))
    for number in range(250):
        assert get(cache, number) in (None, piece(number))
        put(cache, number)
        assert get(cache, number) == piece(number)
    assert kept_bytes(tmp_path) <= 20_000
    assert not list(tmp_path.glob("*/*.tmp")), "what killed processes left goes at the next eviction"


def test_a_temporary_file_in_use_is_left_alone(tmp_path: Path) -> None:
    cache = RangeCache(CacheSettings(tmp_path, 1000))
    put(cache, 1)
    other = kept_files(tmp_path)[0].parent / "others.tmp"
    other.write_bytes(b"half")
    for number in range(40):
        put(cache, number)
    assert other.exists()


def test_a_full_disk_is_one_warning_and_no_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it holds for a whole process."""
    script = """
        import resource, sys
        from pathlib import Path
        from nextlat_dist.data.storage.cache import CacheSettings, RangeCache
        from tests.data.storage.test_cache import get, piece, put
        cache = RangeCache(CacheSettings(Path(sys.argv[1]), 10**6))
        put(cache, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        put(cache, 2, 2000)
        put(cache, 3, 2000)
        assert get(cache, 1) == piece(1)
        assert get(cache, 2, 2000) is None
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(
        f" WARNING data.storage.cache: cache directory {tmp_path} cannot be used (File too large); continuing without "
        "keeping anything more in it\n"
    )
    assert done.stderr.count("\n") == 1
    assert len(kept_files(tmp_path)) == 1


def test_a_directory_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache directory .*file/cache cannot be made \(Not a directory\)"):
        RangeCache(CacheSettings(tmp_path / "file" / "cache", 1000))
