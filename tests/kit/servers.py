"""Real servers on this machine for the tests of remote storages, with switches for what goes wrong on a network."""

from __future__ import annotations

import json
import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from nextlat_dist.data.storage.cache import CacheSettings
from nextlat_dist.data.storage.remote import RemoteStorage

CONTENT = bytes(range(256)) * 8  # of the file that a test's server has


@dataclass
class Switches:
    """What the server does wrong.

    Attributes:
        statuses: of the next answers, one each; 0 closes the connection without any.
        ignore_range: answer 200 with the whole file.
        shift: bytes by which the range that is sent begins late.
        most: bytes of a range that are sent at most, said so in the headers.
        cut: bytes missing at the end of a body, not said in the headers.
        silent: answer nothing at all, or only the headers and half of the body.
        no_head: know no HEAD.
        together: requests that must be there at once before any is answered.
    """

    statuses: list[int] = field(default_factory=list)
    ignore_range: bool = False
    shift: int = 0
    most: int | None = None
    cut: int = 0
    silent: str = ""
    no_head: bool = False
    together: threading.Barrier | None = None


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class FileServer(ThreadingHTTPServer):
    """Files of a directory over HTTP."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, directory: Path, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.directory = directory
        self.switches = Switches()
        self.requests: list[Request] = []
        self.body_bytes = 0
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def misbehave(self, switches: Switches) -> None:
        """From now on; the requests are counted from zero."""
        self.switches = replace(switches, statuses=[*switches.statuses])
        self.requests.clear()
        self.body_bytes = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet; `FileServer.requests` has them."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, switches = self.server, self.server.switches
        server.requests.append(Request(self.command, self.path, dict(self.headers)))
        if switches.together is not None:
            try:
                switches.together.wait(60)
            except threading.BrokenBarrierError:
                return self._answer(400, b"")
        if switches.silent == "answer":
            server.closing.wait()
        status = switches.statuses.pop(0) if switches.statuses else 200
        if status == 0:
            self.close_connection = True
        elif status != 200:
            self._answer(status, b"")
        elif self.command == "HEAD" and switches.no_head:
            self._answer(405, b"")
        else:
            self.respond()

    def respond(self) -> None:
        self.send_file(self.server.directory / unquote(urlsplit(self.path).path).lstrip("/"))

    def send_file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"")
        data, switches = path.read_bytes(), self.server.switches
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or switches.ignore_range:
            return self._answer(200, data, ETag=f'"{path.stat().st_mtime_ns}"')
        begin, end = int(asked[1]) + switches.shift, min(int(asked[2]) + 1, len(data))
        if begin >= len(data):
            return self._answer(416, b"")
        if switches.most is not None:
            end = min(end, begin + switches.most)
        return self._answer(206, data[begin:end], **{"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"})

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        switches = self.server.switches
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if switches.silent == "body":
            self.wfile.write(body[: len(body) // 2])
            self.server.closing.wait()
        if switches.cut and status in (200, 206):
            body = body[: -switches.cut]
            self.close_connection = True
        with suppress(OSError):
            for start in range(0, len(body), 65536):
                self.wfile.write(body[start : start + 65536])
                self.server.body_bytes += 65536


class _GsHandler(_Handler):
    """The three requests of Google's JSON API that reading needs; `bucket/…` lies in the directory."""

    def respond(self) -> None:
        parts = urlsplit(self.path)
        found = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)/o/?(.*)", parts.path)
        if found is None:
            return self._answer(404, b"")
        bucket = self.server.directory / found[2]
        path = bucket / unquote(found[3])
        if found[1]:
            assert parse_qs(parts.query)["alt"] == ["media"]
            return self.send_file(path)
        if found[3]:
            return self._json(_resource(bucket, path)) if path.is_file() else self._answer(404, b"")
        folder = bucket / parse_qs(parts.query)["prefix"][0]
        files = sorted(path for path in folder.glob("*") if path.is_file())
        return self._json({"items": [_resource(bucket, path) for path in files]})

    def _json(self, content: dict[str, Any]) -> None:
        self._answer(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})


def _resource(bucket: Path, path: Path) -> dict[str, Any]:
    status = path.stat()
    key = str(path.relative_to(bucket))
    return {"name": key, "bucket": bucket.name, "size": str(status.st_size), "generation": str(status.st_mtime_ns)}


@contextmanager
def file_server(directory: Path, *, gs: bool = False) -> Iterator[FileServer]:
    server = FileServer(directory, _GsHandler if gs else _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        # Connections that a client keeps open have threads of their own; they die with the process.
        socketserver.TCPServer.server_close(server)
        thread.join()


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3-compatible server that the environment points to; its endpoint."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    aws_environment(monkeypatch, endpoint, key="test")
    try:
        yield endpoint
    finally:
        server.stop()


def aws_environment(monkeypatch: pytest.MonkeyPatch, endpoint: str, *, key: str | None) -> None:
    """Only this endpoint and this key, whatever the machine has."""
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    settings |= {"AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if key is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, key)


def gs_environment(monkeypatch: pytest.MonkeyPatch, server: FileServer) -> None:
    """Only this server, and nobody's credentials."""
    settings = {"STORAGE_EMULATOR_HOST": f"http://{server.address}", "NO_GCE_CHECK": "true"}
    settings |= {"CLOUDSDK_CONFIG": "/nonexistent"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)


def patient(url: str, cache: CacheSettings | None = None, *, tries: int = 3, timeout: float = 20) -> RemoteStorage:
    """A storage that tries again without long pauses."""
    return RemoteStorage(url, cache, timeout_seconds=timeout, pauses_seconds=[0.01] * (tries - 1))
