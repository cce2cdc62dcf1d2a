"""Datasets on real servers of this machine: HTTP, S3 (moto), and a stand-in for Google's JSON API."""

from __future__ import annotations

import logging
import random
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.records import Records
from nextlat_dist.data.shard_format import Manifest, read_manifest
from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.open import open_storage
from nextlat_dist.data.storage.remote import LISTED_FROM, RemoteStorage
from nextlat_dist.errors import UserError
from tests.kit.datasets import numbered_documents, write_dataset
from tests.kit.servers import (
    CONTENT,
    FileServer,
    Switches,
    aws_environment,
    file_server,
    gs_environment,
    patient,
    s3_server,
)

LENGTHS = [20, 50, 3, 100, 1, 40, 70, 70]


@dataclass
class Cloud:
    """A server of some scheme with a writable directory of its own."""

    url: str
    upload: Callable[[str, bytes], Any]


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[str, Any]]:
    """An endpoint, and a file system to write to it with."""
    from s3fs import S3FileSystem  # type: ignore[import-untyped]

    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as endpoint:
        yield endpoint, S3FileSystem(skip_instance_cache=True)


@pytest.fixture(params=["http", "s3", "gs"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    directory = tmp_path / "served" / "bucket" / "deep" / "data"
    directory.mkdir(parents=True)
    with ExitStack() as stack:
        if request.param == "s3":
            endpoint, files = request.getfixturevalue("s3")
            aws_environment(monkeypatch, endpoint, key="test")
            bucket = re.sub(r"\W|_", "-", tmp_path.name)
            files.mkdir(bucket)
            yield Cloud(f"s3://{bucket}/deep/data", lambda name, data: files.pipe(f"{bucket}/deep/data/{name}", data))
            return
        server = stack.enter_context(file_server(tmp_path / "served", gs=request.param == "gs"))
        gs_environment(monkeypatch, server)
        url = "gs://bucket/deep/data" if request.param == "gs" else f"http://{server.address}/bucket/deep/data"
        yield Cloud(url, lambda name, data: (directory / name).write_bytes(data))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "local", numbered_documents(LENGTHS), prompts=[1] * len(LENGTHS), shard_tokens=200)
    return tmp_path / "local"


def upload(dataset: Path, cloud: Cloud) -> None:
    for path in dataset.iterdir():
        cloud.upload(path.name, path.read_bytes())


def open_all(url: str | Path, cache: CacheSettings | None = None) -> tuple[Records, Manifest]:
    place = open_storage(url, cache)
    manifest = read_manifest(place)
    return Records(place, manifest), manifest


@pytest.mark.parametrize("cached", [False, True])
def test_every_record_is_the_local_one(cloud: Cloud, dataset: Path, tmp_path: Path, cached: bool) -> None:
    upload(dataset, cloud)
    remote, manifest = open_all(cloud.url + "/", CacheSettings(tmp_path / "cache", 10**6) if cached else None)
    local, local_manifest = open_all(dataset)
    assert manifest == local_manifest
    assert len(remote) == len(local) > 3
    for _ in range(1 + cached):
        for record in range(len(local)):
            ours, theirs = remote.read(record), local.read(record)
            for member in ("tokens", "ends", "prompts"):
                np.testing.assert_array_equal(getattr(ours, member), getattr(theirs, member))
    assert remote.describe(1).startswith("record 1 at offset ")
    assert remote.describe(1).endswith(f"{cloud.url}/train-000000.tar")


def test_a_bit_flipped_on_the_server_is_noticed(cloud: Cloud, dataset: Path, tmp_path: Path) -> None:
    upload(dataset, cloud)
    storage, manifest = open_all(cloud.url, CacheSettings(tmp_path / "cache", 10**6))
    shard = manifest.shards[0].name
    data = bytearray((dataset / shard).read_bytes())
    data[600] ^= 4
    cloud.upload(shard, bytes(data))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"record 0 at offset 0 of shard {cloud.url}/{shard} is damaged"):
            storage.read(0)
    cloud.upload(shard, (dataset / shard).read_bytes())
    assert len(storage.read(0).tokens) == storage.tokens[0], "what was damaged had been cached"


def test_a_missing_dataset_shard_or_index_is_named(cloud: Cloud, dataset: Path) -> None:
    with pytest.raises(UserError, match=f"{cloud.url} is not a finished dataset"):
        open_all(cloud.url)
    names = {path.name for path in dataset.iterdir()}
    for name in names - {"train-000000.tar", "train-000001.index.npy"}:
        cloud.upload(name, (dataset / name).read_bytes())
    with pytest.raises(UserError, match=f"shard {cloud.url}/train-000000.tar is missing"):
        open_all(cloud.url)
    cloud.upload("train-000000.tar", (dataset / "train-000000.tar").read_bytes())
    with pytest.raises(UserError, match=f"index {cloud.url}/train-000001.index.npy .* is missing"):
        open_all(cloud.url)


def test_ranges_end_with_the_file(cloud: Cloud) -> None:
    cloud.upload("shard.tar", CONTENT)
    place = open_storage(cloud.url)
    assert place.read("shard.tar") == CONTENT
    assert place.read_range("shard.tar", 0, 10, 0) == CONTENT[:10]
    assert place.read_range("shard.tar", 100, 50, 0) == CONTENT[100:150]
    assert place.read_range("shard.tar", len(CONTENT) - 5, 100, 0) == CONTENT[-5:]
    assert place.read_range("shard.tar", len(CONTENT) + 5, 100, 0) == b""


def test_sizes_and_stamps(cloud: Cloud) -> None:
    place = open_storage(cloud.url)
    cloud.upload("a", b"one")
    first = place.stamp("a")
    assert place.stamp("a") == first
    assert place.sizes(["a", "b"]) == [3, None]
    cloud.upload("a", b"two")
    assert place.stamp("a") != first
    for read in (place.stamp, place.read, lambda name: place.read_range(name, 0, 1, 0)):
        with pytest.raises(FileNotFoundError) as caught:
            read("b")
        assert caught.value.filename == f"{cloud.url}/b"


def test_many_sizes_are_right_also_after_a_change(cloud: Cloud) -> None:
    place = open_storage(cloud.url)
    assert place.sizes([f"none-{number}" for number in range(LISTED_FROM)]) == [None] * LISTED_FROM
    cloud.upload("0.tar", b"")
    assert place.sizes(["0.tar"] * LISTED_FROM) == [0] * LISTED_FROM
    for number in range(2 * LISTED_FROM):
        cloud.upload(f"{number}.tar", b"x" * number)
    cloud.upload("0.tar", b"changed")
    names = [f"{number}.tar" for number in reversed(range(3 * LISTED_FROM))]
    expected = [None] * LISTED_FROM + [*reversed(range(1, 2 * LISTED_FROM)), 7]
    assert place.sizes(names) == expected


def test_many_threads_read_at_once(cloud: Cloud) -> None:
    cloud.upload("shard.tar", CONTENT)
    place = open_storage(cloud.url)

    def read(offset: int) -> bool:
        return place.read_range("shard.tar", offset, 50, 0) == CONTENT[offset : offset + 50]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(100)))


def test_object_stores_list_a_directory_instead_of_asking_for_each_file(
    s3: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint, files = s3
    aws_environment(monkeypatch, endpoint, key="test")
    files.mkdir("listed")
    caplog.set_level(logging.INFO, "werkzeug")
    caplog.clear()
    assert open_storage("s3://listed/data").sizes([str(n) for n in range(500)]) == [None] * 500
    assert 1 <= caplog.text.count("GET /listed?list-type=2") <= 2
    assert "HEAD" not in caplog.text
    (tmp_path / "bucket" / "data").mkdir(parents=True)
    with file_server(tmp_path, gs=True) as server:
        gs_environment(monkeypatch, server)
        assert open_storage("gs://bucket/data").sizes([str(n) for n in range(500)]) == [None] * 500
        assert len(server.requests) <= 2


def test_a_web_server_is_asked_for_many_sizes_at_once(server: FileServer) -> None:
    server.switches.together = threading.Barrier(16)
    assert open_storage(f"http://{server.address}").sizes(["shard.tar", "none"] * 40) == [len(CONTENT), None] * 40
    assert {request.method for request in server.requests} == {"HEAD"}


def test_s3_signs_where_there_is_a_key_and_reads_public_buckets_without(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (server.directory / "public").mkdir()
    (server.directory / "public" / "shard.tar").write_bytes(CONTENT)
    for key, signature in (("AKIATEST", r"AWS4-HMAC-SHA256 Credential=AKIATEST/.*"), (None, "")):
        aws_environment(monkeypatch, f"http://{server.address}", key=key)
        server.requests.clear()
        assert open_storage("s3://public").read_range("shard.tar", 3, 4, 0) == CONTENT[3:7]
        (request,) = server.requests
        assert request.path == "/public/shard.tar"
        assert request.headers["Range"] == "bytes=3-6"
        assert re.fullmatch(signature, request.headers.get("Authorization", ""))


def test_gs_asks_googles_json_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket" / "a b").mkdir(parents=True)
    (tmp_path / "bucket" / "a b" / "shard.tar").write_bytes(CONTENT)
    with file_server(tmp_path, gs=True) as server:
        gs_environment(monkeypatch, server)
        assert open_storage("gs://bucket/a b").read_range("shard.tar", 3, 4, 0) == CONTENT[3:7]
        (request,) = server.requests
    assert request.path == "/download/storage/v1/b/bucket/o/a%20b%2Fshard.tar?alt=media"
    assert request.headers["Range"] == "bytes=3-6"
    assert "Authorization" not in request.headers


# What goes wrong on a network. The s3 cases run against the same server, whose answers to GET are those of S3.


@dataclass
class Faulty:
    """A place whose `shard.tar` comes from a server that can be told to misbehave; `hasty` waits only a moment."""

    place: RemoteStorage
    hasty: RemoteStorage
    server: FileServer


@pytest.fixture(scope="module", params=["http", "s3"])
def one_faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    root = tmp_path_factory.mktemp("faulty")
    (root / "data").mkdir()
    (root / "data" / "shard.tar").write_bytes(CONTENT)
    with pytest.MonkeyPatch.context() as environment, file_server(root) as server:
        aws_environment(environment, f"http://{server.address}", key="test")
        url = f"http://{server.address}/data" if request.param == "http" else "s3://data"
        place, hasty = patient(url), patient(url, timeout=0.3)
        assert place.read_range("shard.tar", 5, 10, 0) == hasty.read_range("shard.tar", 5, 10, 0) == CONTENT[5:15]
        yield Faulty(place, hasty, server)


@pytest.fixture
def faulty(one_faulty: Faulty) -> Faulty:
    one_faulty.server.misbehave(Switches())
    return one_faulty


@pytest.mark.parametrize("statuses", [[503], [500, 502], [0], [0, 500], [429]])
def test_passing_trouble_passes(faulty: Faulty, statuses: list[int]) -> None:
    state = random.getstate()
    faulty.server.switches.statuses = [*statuses]
    assert faulty.place.read_range("shard.tar", 5, 10, 0) == CONTENT[5:15]
    assert len(faulty.server.requests) == len(statuses) + 1
    assert random.getstate() == state, "a run would go another way after trouble"


@pytest.mark.parametrize(
    ("switches", "cause"),
    [
        (Switches(statuses=[503] * 99), "HTTP status 503"),
        (Switches(statuses=[0] * 99), ""),
        (Switches(silent="answer"), "no answer in time|imeout"),
        (Switches(silent="body"), "no answer in time|imeout"),
        (Switches(cut=3), ""),
    ],
)
def test_lasting_trouble_is_an_error_with_url_cause_and_tries(faulty: Faulty, switches: Switches, cause: str) -> None:
    faulty.server.misbehave(switches)
    place = faulty.hasty if switches.silent else faulty.place
    with pytest.raises(ConnectionError, match="tried 3 times") as caught:
        place.read_range("shard.tar", 5, 10, 0)
    assert caught.value.filename == f"{faulty.place.url}/shard.tar"
    assert re.search(cause, str(caught.value))
    assert "\n" not in str(caught.value)
    # aiohttp sends a request again by itself when the connection is closed on it.
    assert len(faulty.server.requests) == 3 * (2 if 0 in switches.statuses else 1)


@pytest.mark.parametrize(("status", "kind"), [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)])
def test_what_lasts_is_asked_once(faulty: Faulty, status: int, kind: type[OSError]) -> None:
    faulty.server.switches.statuses = [status] * 9
    with pytest.raises(kind) as caught:
        faulty.place.read_range("shard.tar", 5, 10, 0)
    assert caught.value.filename == f"{faulty.place.url}/shard.tar"
    assert len(faulty.server.requests) == 1


@pytest.mark.parametrize("status", [400, 409])
def test_any_other_refusal_is_asked_once(faulty: Faulty, status: int) -> None:
    faulty.server.switches.statuses = [status] * 9
    with pytest.raises(OSError, match=f"HTTP status {status}") as caught:
        faulty.place.read_range("shard.tar", 5, 10, 0)
    assert not isinstance(caught.value, ConnectionError)
    assert len(faulty.server.requests) == 1


def test_nobody_listening_is_an_error_with_the_tries(server: FileServer) -> None:
    url = f"http://{server.address}"
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"tried 2 times: 'http://.*/shard.tar'"):
        patient(url, tries=2).read("shard.tar")


def test_a_flaky_server_is_not_a_missing_file(server: FileServer) -> None:
    """fsspec's own HTTP file system says FileNotFoundError to both."""
    place = patient(f"http://{server.address}")
    server.switches.statuses = [500, 0]
    assert place.sizes(["shard.tar"]) == [len(CONTENT)]
    server.switches.statuses = [500] * 9
    with pytest.raises(ConnectionError):
        place.sizes(["shard.tar"])
    server.switches.statuses = [403]
    with pytest.raises(PermissionError):
        place.sizes(["shard.tar"])


def test_gcsfs_trouble_has_the_same_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "shard.tar").write_bytes(CONTENT)
    with file_server(tmp_path, gs=True) as server:
        gs_environment(monkeypatch, server)
        server.switches.statuses = [503]
        assert patient("gs://bucket").read_range("shard.tar", 3, 4, 0) == CONTENT[3:7]
        for status, kind in ((404, FileNotFoundError), (403, PermissionError), (401, PermissionError)):
            server.switches.statuses = [status] * 9
            with pytest.raises(kind) as caught:
                patient("gs://bucket").read_range("shard.tar", 3, 4, 0)
            assert caught.value.filename == "gs://bucket/shard.tar"
