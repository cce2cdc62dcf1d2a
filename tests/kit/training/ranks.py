"""Real ranks of a training command, to be stopped, killed or left hanging."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.kit.harness import free_port


@contextlib.contextmanager
def running_ranks(
    raw: dict[str, Any], size: int, program: Sequence[str] = ("-m", "nextlat_dist.cli")
) -> Iterator[list[subprocess.Popen[str]]]:
    """`nextlat train` with this configuration, one process per rank; none of them outlives the block."""
    config = Path(raw["output_dir"]) / "given.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(raw))
    command = [sys.executable, *program, "train", "--config", str(config)]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [process.communicate()[0] for process in processes if process.poll() is not None]
        assert not ended, "\n".join(ended)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_step(output: Path) -> int:
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
