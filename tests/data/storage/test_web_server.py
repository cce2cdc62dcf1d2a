"""Datasets on a web server: what a server must be able to do, what it is told, and what is kept of its answers."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest

from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.errors import UserError
from tests.kit.servers import (
    CONTENT,
    FileServer,
    patient,
)


def test_a_server_without_ranges_is_refused_before_it_sends_a_whole_shard(server: FileServer) -> None:
    (server.directory / "large.tar").write_bytes(bytes(20_000_000))
    server.switches.ignore_range = True
    with pytest.raises(UserError, match=r"127.0.0.1 answers a range request with the whole file.*Range"):
        patient(f"http://{server.address}").read_range("large.tar", 5, 10, 0)
    assert len(server.requests) == 1
    assert server.body_bytes < 10_000_000


@pytest.mark.parametrize(("switch", "value"), [("shift", 3), ("most", 4)])
def test_another_range_than_asked_for_is_an_error(server: FileServer, switch: str, value: int) -> None:
    setattr(server.switches, switch, value)
    with pytest.raises(ConnectionError, match=r"asked for bytes.*tried 3 times"):
        patient(f"http://{server.address}").read_range("shard.tar", 5, 10, 0)


def test_bytes_are_never_compressed_on_the_way(server: FileServer) -> None:
    place = patient(f"http://{server.address}")
    place.read("shard.tar")
    place.read_range("shard.tar", 5, 10, 0)
    place.sizes(["shard.tar"])
    assert [request.headers["Accept-Encoding"] for request in server.requests] == ["identity"] * 3


def test_a_server_without_head_tells_sizes_by_a_range(server: FileServer) -> None:
    server.switches.no_head = True
    place = patient(f"http://{server.address}")
    assert place.sizes(["shard.tar", "none"]) == [len(CONTENT), None]
    assert {request.headers.get("Range") for request in server.requests if request.method == "GET"} == {"bytes=0-0"}


SECRETS = ("user", "pass%2Fword", "pass/word", "sig=", "abc%3D")


def test_secrets_reach_the_server_and_nothing_else(server: FileServer, tmp_path: Path) -> None:
    url = f"http://user:pass%2Fword@{server.address}"
    cache = CacheSettings(tmp_path / "cache", 10**6)
    place = patient(f"{url}?sig=abc%3D", cache, tries=2)
    data = CONTENT[5:15]
    assert place.read_range("shard.tar", 5, 10, crc32(data)) == data
    (request,) = server.requests
    assert request.path == "/shard.tar?sig=abc%3D"
    assert request.headers["Authorization"].startswith("Basic ")
    messages = [place.url, place.full_name("shard.tar"), place.full_name(f"{url}/other?sig=abc%3D")]
    assert messages[0] == f"http://{server.address}"
    for statuses in ([404], [403], [400], [500] * 2, [0] * 9):
        server.switches.statuses = statuses
        with pytest.raises(OSError) as caught:  # noqa: PT011
            place.read("shard.tar")
        messages.append(str(caught.value))
        assert caught.value.__suppress_context__
        assert caught.value.__cause__ is None, "the error below may name the whole URL"
    for bad in ("ftp://user:pass%2Fword@host/x?sig=abc%3D", "http://user:pass%2Fword@host:port/x?sig=abc%3D"):
        with pytest.raises((UserError, OSError)) as refused:
            patient(bad).read("shard.tar")
        messages.append(str(refused.value))
    assert not [message for message in messages for secret in SECRETS if secret in message]
    # Another signature of the same file finds what is kept.
    server.requests.clear()
    assert patient(f"http://{server.address}?sig=other", cache).read_range("shard.tar", 5, 10, crc32(data)) == data
    assert not server.requests


def test_names_are_quoted_and_a_quoted_url_stays_as_it_is(server: FileServer) -> None:
    (server.directory / "a b#c%").mkdir()
    (server.directory / "a b#c%" / "x y+?.tar").write_bytes(CONTENT)
    place = patient(f"http://{server.address}/a%20b%23c%25?sig=a%2Fb+c")
    assert place.read("x y+?.tar") == CONTENT
    assert server.requests[0].path.endswith("?sig=a%2Fb+c")


def test_what_is_kept_is_not_asked_for_again_and_heals(server: FileServer, tmp_path: Path) -> None:
    cache = CacheSettings(tmp_path / "cache", 10**6)
    place = patient(f"http://{server.address}", cache)
    data = CONTENT[5:15]
    for reader in (place, place, patient(f"http://{server.address}/", cache)):
        assert reader.read_range("shard.tar", 5, 10, crc32(data)) == data
    assert len(server.requests) == 1
    (kept,) = [path for path in cache.directory.glob("*/*") if path.is_file()]
    assert kept.read_bytes() == data
    kept.write_bytes(data[:-1] + b"!")
    assert place.read_range("shard.tar", 5, 10, crc32(data)) == data
    assert len(server.requests) == 2
    assert kept.read_bytes() == data
    # Bytes that are not those asked for are handed out, for the reader to refuse, and not kept.
    assert place.read_range("shard.tar", 5, 10, 1234) == data
    assert [path for path in cache.directory.glob("*/*") if path.is_file()] == [kept]


def test_whole_files_are_asked_for_each_time(server: FileServer, tmp_path: Path) -> None:
    place = patient(f"http://{server.address}", CacheSettings(tmp_path / "cache", 10**6))
    assert place.read("shard.tar") == CONTENT
    (server.directory / "shard.tar").write_bytes(b"new")
    assert place.read("shard.tar") == b"new"
