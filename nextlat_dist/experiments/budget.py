"""Experiments in a number of minutes: named stages with their seconds, and a short run that tells how much fits.

Commands run in processes of their own, as a user would start them; what they print is shown.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextlat_dist.config.load import load_config
from nextlat_dist.errors import UserError
from nextlat_dist.experiments.cell import NEXTLAT, NEXTLAT_DATA
from nextlat_dist.files import METRICS_FILE, make_folder, remove, write_whole, writing
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.tables import table

COLUMNS = {"stage": "{stage}", "seconds": "{seconds:.1f}"}


@dataclass
class Stages:
    """What took how long."""

    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        say(f"[{self.passed:.0f} s] {name}", error=True)
        started = self.passed
        yield
        self.rows.append({"stage": name, "seconds": self.passed - started})

    def table(self) -> str:
        return table(COLUMNS, self.rows)


def nextlat(*arguments: object) -> None:
    """Run `nextlat` with these arguments. Raises UserError when it fails."""
    _run("nextlat", NEXTLAT, arguments)


def nextlat_data(*arguments: object) -> None:
    """The same with `nextlat-data`."""
    _run("nextlat-data", NEXTLAT_DATA, arguments)


def _run(program: str, words: Sequence[str], arguments: Sequence[object]) -> None:
    status = subprocess.run([*words, *map(str, arguments)], check=False).returncode
    if status != 0:
        raise UserError(f"{program} {arguments[0]} ended with status {status}; its reason is above")


def start_over(output: Path, benchmark: str) -> None:
    """An empty folder `output`; what an earlier run of the same benchmark left there is removed.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    mark = output / ".nextlat-benchmark"
    with writing(output):
        if not output.is_dir() or not any(output.iterdir()):
            make_folder(output)
        elif mark.is_file() and mark.read_text() == benchmark:
            for left in sorted(set(output.iterdir()) - {mark}):
                if reason := remove(left):
                    raise UserError(f"{left} of an earlier benchmark cannot be removed ({reason}); remove it by hand")
        else:
            raise UserError(
                f"--output {output} is not empty and is no folder of this benchmark: it will not be replaced; name "
                "another, or empty it"
            )
        write_whole(mark, benchmark)


def train(config: Path, overrides: Sequence[str]) -> None:
    nextlat("train", "--config", config, *overrides)


def tokens_per_step(config: Path, settings: Sequence[str]) -> int:
    return load_config(config, list(settings)).tokens_per_step


def probe(config: Path, settings: Sequence[str], output: Path, steps: int) -> tuple[float, float]:
    """(tokens per second of training, seconds that a run takes besides its steps), from a run of a few steps, of which
    the first half does not count. `output` is removed again.
    """
    tokens = steps * tokens_per_step(config, settings)
    started = time.monotonic()
    train(config, [*settings, f"training.train_tokens={tokens}", "training.log_interval=1", f"output_dir={output}"])
    wall = time.monotonic() - started
    rates = [line["tokens_per_second"] for line in logged(output) if "loss" in line][steps // 2 :]
    shutil.rmtree(output)
    speed = len(rates) / sum(1 / rate for rate in rates)  # of all those steps together
    return speed, max(0.0, wall - tokens / speed)


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
