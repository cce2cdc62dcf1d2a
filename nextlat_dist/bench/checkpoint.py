"""Benchmark of checkpoints: how long a save keeps training waiting.

    python -m nextlat_dist.bench.checkpoint [--json FILE] [--quick] [--directory DIR]

`stall_ratio`            time that training waits for a background save over that for a synchronous one
`stall_seconds`          the former
`synchronous_seconds`    the latter: copying, writing, flushing to disk, hashing, renaming
`background_seconds`     from the copy to the commit, while training continues

One rank with a real engine; the two kinds of save alternate. The ratio depends on the disk: name one with --directory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nextlat_dist.bench.timing import with_summary
from nextlat_dist.config.load import config_from_dict
from nextlat_dist.errors import UserError
from nextlat_dist.files import CHECKPOINTS_FOLDER
from nextlat_dist.reporting.publish import run_benchmark
from nextlat_dist.reporting.report import Report

COMMAND = "python -m nextlat_dist.bench.checkpoint"
COLUMNS = {
    "save": "{save}",
    "training waits, s": "{stall_seconds:.3f}",
    "until committed, s": "{total_seconds:.3f}",
    "GB": "{gigabytes:.3f}",
}
FULL = {"rounds": 7, "num_layers": 8, "hidden_size": 512, "vocab_size": 16384}
QUICK = {"rounds": 2, "num_layers": 2, "hidden_size": 64, "vocab_size": 512}


def bench_checkpoint(sizes: dict[str, int], directory: Path) -> Report:
    """Saves below `directory`."""
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    from nextlat_dist.parallel.dims import ParallelDims, shutdown
    from nextlat_dist.training.engine.build import build_engine
    from nextlat_dist.training.state.saving import Saver
    from nextlat_dist.training.state.trainer_state import TrainerState

    model = {key: sizes[key] for key in ("num_layers", "hidden_size", "vocab_size")}
    raw = {"model": {**model, "num_attention_heads": 4}, "training": {"micro_batch_size": 1, "global_batch_size": 1}}
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    size = 0
    step = 0
    try:
        for background in (False, True):
            config = config_from_dict({**raw, "checkpoint": {"background": background, "keep_last": 1}})
            if not step:
                dims = ParallelDims.initialize(config.parallel)
                engine = build_engine(config, dims)
                savers = {}
            savers[background] = Saver(config, dims, engine, directory / CHECKPOINTS_FOLDER, None)
            step += 1
        with tqdm(total=2 * (sizes["rounds"] + 1), desc="bench checkpoint", file=sys.stderr, unit="save") as bar:
            for number in range(sizes["rounds"] + 1):
                for background in (False, True) if number % 2 else (True, False):
                    step += 1
                    begin = time.perf_counter()
                    savers[background].save(TrainerState(step=step))
                    waited = time.perf_counter() - begin
                    (outcome,) = savers[background].finish()
                    if outcome.error:
                        raise UserError(outcome.error)
                    if number:  # the first of each touches its memory for the first time
                        times[background].append((waited, time.perf_counter() - begin))
                    bar.update()
        (left,) = (directory / CHECKPOINTS_FOLDER).glob("step_*")
        size = sum(path.stat().st_size for path in left.rglob("*") if path.is_file())
        for saver in savers.values():
            saver.close()
    finally:
        shutdown()
    rows: list[dict[str, Any]] = [
        {
            "save": "background" if background else "synchronous",
            "stall_seconds": statistics.median(waited for waited, _ in found),
            "total_seconds": statistics.median(total for _, total in found),
            "gigabytes": size / 1e9,
        }
        for background, found in times.items()
    ]
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(times[True], times[False], strict=True))
    summary = {
        "stall_ratio": ratio,
        "stall_seconds": rows[1]["stall_seconds"],
        "synchronous_seconds": rows[0]["stall_seconds"],
        "background_seconds": rows[1]["total_seconds"],
    }
    return Report(COMMAND, sizes, summary, rows, text=with_summary(COLUMNS, rows, summary))


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(COMMAND, "How long a save keeps training waiting.", _measure, arguments, _add_options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", type=Path, metavar="DIR", help="save below this directory (default: temporary)")


def _measure(options: argparse.Namespace) -> Report:
    with tempfile.TemporaryDirectory(prefix="nextlat-bench-", dir=options.directory) as directory:
        return bench_checkpoint(QUICK if options.quick else FULL, Path(directory))


if __name__ == "__main__":
    sys.exit(main())
