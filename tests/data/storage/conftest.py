"""A web server of this machine with one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.servers import CONTENT, FileServer, file_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    root = tmp_path / "served"
    root.mkdir()
    (root / "shard.tar").write_bytes(CONTENT)
    with file_server(root) as server:
        yield server
