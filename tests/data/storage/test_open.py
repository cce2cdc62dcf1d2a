from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkContext, SpawnContext
from pathlib import Path

import numpy as np
import pytest

from nextlat_dist.data.storage.base import Storage
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.local import OPEN_FILES, LocalStorage
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.errors import UserError
from tests.kit.servers import file_server

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "shard.tar").write_bytes(CONTENT)
    return tmp_path


def open_below(directory: Path) -> int:
    """Descriptors of this process on files of a directory."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue
    return sum(name.startswith(str(directory)) for name in names)


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_local_dataset_is_a_path_or_a_file_url(directory: Path, form: str) -> None:
    storage = open_storage(form.format(directory))
    assert storage.url == str(directory)
    assert storage.full_name("shard.tar") == str(directory / "shard.tar")
    assert storage.read("shard.tar") == CONTENT
    assert storage.read_range("shard.tar", 100, 50, 0) == CONTENT[100:150]
    assert storage.sizes(["shard.tar", "nothing", "."]) == [len(CONTENT), None, None]


def test_a_file_url_is_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "a b%20c"
    directory.mkdir()
    (directory / "shard.tar").write_bytes(CONTENT)
    assert open_storage(directory.as_uri()).read("shard.tar") == CONTENT


def test_a_range_ends_with_the_file(directory: Path) -> None:
    storage = LocalStorage(directory)
    assert storage.read_range("shard.tar", len(CONTENT) - 5, 100, 0) == CONTENT[-5:]
    assert storage.read_range("shard.tar", len(CONTENT) + 5, 100, 0) == b""


def test_a_range_is_whole_even_when_the_file_system_gives_it_in_pieces(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: whole(descriptor, min(length, 7), offset))
    storage = LocalStorage(directory)
    assert storage.read_range("shard.tar", 100, 50, 0) == CONTENT[100:150]
    assert storage.read_range("shard.tar", len(CONTENT) - 20, 50, 0) == CONTENT[-20:]


def test_missing_files_are_named(directory: Path) -> None:
    storage = open_storage(directory)
    for read in (storage.read, storage.stamp, lambda name: storage.read_range(name, 0, 1, 0)):
        with pytest.raises(FileNotFoundError, match="nothing"):
            read("nothing")


def test_the_stamp_changes_with_the_file(directory: Path) -> None:
    storage = LocalStorage(directory)
    stamps = [storage.stamp("shard.tar")]
    (directory / "shard.tar").write_bytes(CONTENT[::-1])
    os.utime(directory / "shard.tar", ns=(1, 1))
    stamps.append(storage.stamp("shard.tar"))
    (directory / "shard.tar").write_bytes(CONTENT[:-1])
    os.utime(directory / "shard.tar", ns=(1, 1))
    stamps.append(storage.stamp("shard.tar"))
    assert len(set(stamps)) == 3


def test_bytes_written_into_an_open_file_are_seen(directory: Path) -> None:
    storage = LocalStorage(directory)
    storage.read_range("shard.tar", 0, 10, 0)
    (directory / "shard.tar").write_bytes(CONTENT[::-1])
    assert storage.read_range("shard.tar", 0, 10, 0) == CONTENT[::-1][:10]


def test_an_open_file_that_is_replaced_is_read_on_and_a_new_place_reads_the_new_one(directory: Path) -> None:
    storage = LocalStorage(directory)
    storage.read_range("shard.tar", 0, 10, 0)
    (directory / "new").write_bytes(CONTENT[::-1])
    (directory / "new").replace(directory / "shard.tar")
    assert storage.read_range("shard.tar", 0, 10, 0) == CONTENT[:10]
    assert LocalStorage(directory).read_range("shard.tar", 0, 10, 0) == CONTENT[::-1][:10]


def test_many_threads_over_more_files_than_stay_open(tmp_path: Path) -> None:
    """A descriptor that is closed while another thread reads gives an error or another file's bytes."""
    files = 2 * OPEN_FILES
    for number in range(files):
        (tmp_path / str(number)).write_bytes(number.to_bytes(4, "little") * 64)
    storage = LocalStorage(tmp_path)

    def read(seed: int) -> int:
        for number in np.random.default_rng(seed).integers(0, files, 2000):
            assert storage.read_range(str(number), 16, 4, 0) == int(number).to_bytes(4, "little")
        return open_below(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        opened = list(pool.map(read, range(8)))
    assert OPEN_FILES // 2 < max(opened) <= OPEN_FILES + 8


def test_files_are_closed_with_their_place(directory: Path) -> None:
    storage = LocalStorage(directory)
    storage.read_range("shard.tar", 0, 10, 0)
    assert open_below(directory) == 1
    del storage
    assert open_below(directory) == 0


def test_a_process_with_too_many_open_files_reads_on(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / str(number)).write_bytes(CONTENT)
    storage = LocalStorage(tmp_path)
    for number in range(10):
        storage.read_range(str(number), 0, 1, 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = os.open("/dev/null", os.O_RDONLY)
    os.close(highest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.open("/dev/null", os.O_RDONLY)
        assert storage.read_range("15", 100, 50, 0) == CONTENT[100:150]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _read_elsewhere(storage: Storage, name: str, answers: multiprocessing.Queue[bytes]) -> None:
    answers.put(storage.read_range(name, 100, 50, 0))


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")])
def test_a_place_works_in_another_process(directory: Path, context: ForkContext | SpawnContext) -> None:
    answers = context.Queue()
    with file_server(directory) as server:
        for storage in (open_storage(directory), open_storage(f"http://{server.address}/")):
            assert storage.read_range("shard.tar", 0, 5, 0) == CONTENT[:5]
            process = context.Process(target=_read_elsewhere, args=(storage, "shard.tar", answers))
            process.start()
            assert answers.get(timeout=60) == CONTENT[100:150]
            process.join()
            assert storage.read_range("shard.tar", 5, 5, 0) == CONTENT[5:10]


def test_names_may_be_full_paths_and_urls_whatever_the_place(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "manifest.json").write_text("{}")
    with file_server(directory) as server:
        url = f"http://{server.address}/shard.tar"
        for dataset in (home, f"file://{home}", f"http://{server.address}"):
            storage = open_storage(dataset)
            for name in (url, str(directory / "shard.tar"), f"file://{directory}/shard.tar"):
                assert storage.full_name(name) == name.removeprefix("file://")
                assert storage.read(name) == CONTENT
                assert storage.read_range(name, 100, 50, 0) == CONTENT[100:150]
                assert storage.stamp(name)
        storage = open_storage(home)
        names = [url, "manifest.json", str(directory / "shard.tar"), "nothing", f"{url}s"]
        assert storage.sizes(names) == [len(CONTENT), 2, len(CONTENT), None, None]
        assert pickle.loads(pickle.dumps(storage)).read(url) == CONTENT


def test_ranges_of_a_foreign_url_are_cached_too(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from zlib import crc32

    home = tmp_path_factory.mktemp("home")
    with file_server(directory) as server:
        storage = open_storage(home, CacheSettings(home / "cache", 10**6))
        for _ in range(2):
            assert storage.read_range(f"http://{server.address}/shard.tar", 0, 50, crc32(CONTENT[:50])) == CONTENT[:50]
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hdfs://name/data", ["hdfs://name/data", "unknown scheme 'hdfs'", "s3://"]),
        ("file://other/data", ["other", "file:///full/path"]),
        ("s3://KEY:SECRET@bucket/data", ["s3://", "environment"]),
        ("s3://KEY:SEC/RET@bucket/data", ["s3://", "environment"]),
    ],
)
def test_bad_addresses_are_refused_in_a_sentence(url: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        open_storage(url)
    assert all(word in str(caught.value) for word in words)
    assert "SEC" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "library", "extra"), [("https", "aiohttp", "http"), ("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")]
)
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, scheme: str, library: str, extra: str
) -> None:
    monkeypatch.setattr("nextlat_dist.data.storage.catalogue.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs the package {library}: pip install 'nextlat-dist\[{extra}\]'"):
        open_storage(f"{scheme}://bucket/data")
