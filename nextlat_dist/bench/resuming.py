"""Seconds to resume at a sample far into a dataset of two billion tokens.

Every shard name is a hard link to one real shard, so that the dataset has the manifest, the indices, the file sizes and
the readable records of two billion tokens on the disk space of one shard. A fresh process opens it with the cursor and
reads the batch that begins there; what it imports is not counted, since a training process has that anyway.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextlat_dist.bench.loading import Setting, open_loader
from nextlat_dist.bench.timing import cores, row
from nextlat_dist.data.shard_format import MANIFEST_FILE, index_name, manifest_bytes, read_manifest, shard_name
from nextlat_dist.reporting.console import say

SETTING = Setting("concat", 127)  # two billion tokens are 15.6 million rows of 128
GLOBAL_BATCH_SIZE = 64
CHILD = "import sys; from nextlat_dist.bench.resuming import resume; resume(sys.argv[1], int(sys.argv[2]))"


def resume(dataset: str, row: int) -> None:
    """Open the dataset at this row, read a batch, and print how long that took as JSON."""
    import webdataset  # noqa: F401  (imports torch, as every training process has done)

    started = time.perf_counter()
    loader = open_loader(Path(dataset), SETTING, global_batch_size=GLOBAL_BATCH_SIZE, row=row)
    opened = time.perf_counter()
    batch = loader.next_batch()
    read = time.perf_counter()
    assert batch.tokens.shape == (GLOBAL_BATCH_SIZE, SETTING.sequence_length + 1)
    say(json.dumps({"seconds": read - started, "open": opened - started, "first_batch": read - opened}))


def multiply(dataset: Path, tokens: int) -> int:
    """Make a dataset of one shard one of at least `tokens` tokens by hard links; returns how many shards it has."""
    manifest = read_manifest(dataset)
    (shard,) = manifest.shards
    shards = [shard]
    while len(shards) * shard.tokens < tokens:
        name = shard_name(manifest.split, len(shards))
        os.link(dataset / shard.name, dataset / name)
        os.link(dataset / index_name(shard.name), dataset / index_name(name))
        shards.append(dataclasses.replace(shard, name=name))
    (dataset / MANIFEST_FILE).write_bytes(manifest_bytes(dataclasses.replace(manifest, shards=tuple(shards))))
    return len(shards)


def measure_resuming(
    dataset: Path, sample: int, *, rounds: int, done: Callable[[str], None]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Summary and rows of resuming at row `sample` of the dataset.

    The first time on a machine the shards that are needed are hashed; `resume_seconds` has that in it.
    """
    manifest = read_manifest(dataset)
    rows_per_epoch = manifest.tokens // (SETTING.sequence_length + 1)
    name = (
        f"resume at sample {sample:,} of {rows_per_epoch:,} ({len(manifest.shards)} shards, {manifest.records:,} "
        f"records, {manifest.tokens:,} tokens)"
    )
    command = [sys.executable, "-c", CHILD, str(dataset), str(sample)]
    first: list[dict[str, float]] = []
    again: list[dict[str, float]] = []
    for number in range(rounds):
        environment = {**os.environ, "NEXTLAT_CACHE": str(dataset.with_name(f"{dataset.name}-cache-{number}"))}
        for runs in (first, again):
            with cores(1):
                process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs.append(json.loads(process.stdout))
            done(name)
    rows = [
        row(name, seconds=_median(first, "seconds")),
        row("  of which opening", seconds=_median(first, "open")),
        row("  again on the same machine", seconds=_median(again, "seconds")),
    ]
    return {"resume_seconds": _median(first, "seconds")}, rows


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)
