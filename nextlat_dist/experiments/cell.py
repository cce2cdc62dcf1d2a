"""One cell's way: train, export, each evaluation; every step a process with a log, and a stamp once it is through.

A step's key is a hash of what decides its result: the resolved config without its output directory, the manifests of
the datasets, the arguments, and the key of the step before. Invariant: a step whose stamp has its key is never run
again, one without is; a training that was cut short goes on from its checkpoint only under the same key, and starts
from nothing otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.config.load import config_to_dict, dump_config
from nextlat_dist.data.shard_format import MANIFEST_FILE
from nextlat_dist.experiments.grid import TRAINING, Cell, Grid
from nextlat_dist.experiments.processes import Processes

NEXTLAT = (sys.executable, "-m", "nextlat_dist.cli")
NEXTLAT_DATA = (sys.executable, "-m", "data_tools.cli")


class StepFailed(Exception):
    """A step's process ended with another status than 0."""

    def __init__(self, step: str, status: int, log: Path) -> None:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        self.step, self.log = step, log
        super().__init__(f"{step} ended with status {status}: {lines[-1].strip() if lines else 'it said nothing'}")


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    key: str


@dataclass(frozen=True)
class Result:
    """Numbers of a finished cell, `evaluation/name` → value; what its summary lacks is left out."""

    numbers: dict[str, float]
    seconds: float


def make_data(grid: Grid, output: Path, processes: Processes) -> None:
    """Write the grid's data into `output`/data unless they are there. Raises StepFailed."""
    if not grid.data:
        return
    command = (*NEXTLAT_DATA, *_fill(grid.data, output))
    step = Step("data", command, _hash(list(grid.data)))
    if _stamp(output, step) is None:
        shutil.rmtree(output / "data", ignore_errors=True)
        _run(step, output, processes)


def run_cell(cell: Cell, grid: Grid, output: Path, processes: Processes) -> float:
    """Run what is left of the cell; the seconds of all its steps, whenever they ran. Raises StepFailed."""
    for step in steps_of(cell, grid, output):
        if _stamp(cell.directory, step) is not None:
            continue
        if step.name == "train":
            _prepare_training(cell, step)
        _run(step, cell.directory, processes)
    return _seconds(cell, grid, output)


def finished(cell: Cell, grid: Grid, output: Path) -> bool:
    return all(_stamp(cell.directory, step) is not None for step in steps_of(cell, grid, output))


def steps_of(cell: Cell, grid: Grid, output: Path) -> Iterator[Step]:
    """In order; the data must be there, for keys hold the hashes of manifests."""
    content = config_to_dict(cell.config)
    del content["output_dir"]
    key = _hash(_with_manifests(content))
    yield Step("train", (*NEXTLAT, "train", "--config", str(cell.directory / "config.yaml")), key)
    export = ("export", "--checkpoint", "{run}/checkpoints", "--output", "{export}")
    key = _hash([key, *export])
    yield Step("export", (*NEXTLAT, *_fill(export, output, cell)), key)
    for name, evaluation in grid.evaluations.items():
        given = _with_manifests([word.replace("{data}", str(output / "data")) for word in evaluation.arguments])
        command = (*NEXTLAT, "evaluate", *_fill(evaluation.arguments, output, cell), "--json")
        yield Step(name, (*command, str(cell.directory / f"{name}.json")), _hash([key, *given]))


def _prepare_training(cell: Cell, step: Step) -> None:
    started = cell.directory / "train.key"
    if not started.is_file() or started.read_text() != step.key:
        shutil.rmtree(cell.directory, ignore_errors=True)
        cell.directory.mkdir(parents=True)
        (cell.directory / "config.yaml").write_text(dump_config(cell.config))
        started.write_text(step.key)


def _run(step: Step, directory: Path, processes: Processes) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    log, start = directory / f"{step.name}.log", time.monotonic()
    with log.open("ab") as stream:
        status = processes.run(step.command, stream)
    if status != 0:
        raise StepFailed(step.name, status, log)
    stamp = _stamp_file(directory, step)
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": step.key, "seconds": time.monotonic() - start}))
    os.replace(temporary, stamp)


def _stamp_file(directory: Path, step: Step) -> Path:
    return directory / f"{step.name}.done"


def _stamp(directory: Path, step: Step) -> dict[str, Any] | None:
    file = _stamp_file(directory, step)
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content if content.get("key") == step.key else None


def collect(cell: Cell, grid: Grid, output: Path) -> Result:
    """What the grid asks for of a finished cell."""
    summaries = {kind: _summary(cell, kind) for kind in (TRAINING, *grid.evaluations)}
    numbers = {}
    for place in grid.headings:
        kind, _, name = place.partition("/")
        if summaries[kind].get(name) is not None:
            numbers[place] = float(summaries[kind][name])
    return Result(numbers, _seconds(cell, grid, output))


def summary_names(cell: Cell, kind: str) -> list[str]:
    """Names of the numbers that a finished cell has of an evaluation, or of its training."""
    return [name for name, value in _summary(cell, kind).items() if isinstance(value, (int, float))]


def _summary(cell: Cell, kind: str) -> dict[str, Any]:
    """An evaluation's summary; of the training the last value of every field that it logged."""
    if kind == TRAINING:
        fields: dict[str, Any] = {}
        for line in (cell.directory / "run" / "metrics.jsonl").read_text().splitlines():
            fields |= json.loads(line)
        return fields
    summary: dict[str, Any] = json.loads((cell.directory / f"{kind}.json").read_text())["summary"]
    return summary


def _seconds(cell: Cell, grid: Grid, output: Path) -> float:
    stamps = [_stamp(cell.directory, step) for step in steps_of(cell, grid, output)]
    return round(sum(stamp["seconds"] for stamp in stamps if stamp is not None), 1)


def _fill(words: Sequence[str], output: Path, cell: Cell | None = None) -> tuple[str, ...]:
    places = {"{data}": output / "data"}
    if cell is not None:
        places |= {"{run}": cell.directory / "run", "{export}": cell.directory / "export"}
    filled = list(words)
    for placeholder, path in places.items():
        filled = [word.replace(placeholder, str(path)) for word in filled]
    return tuple(filled)


def _with_manifests(content: Any) -> Any:
    """`content` with the hash of its manifest in the place of every local dataset's path."""
    if isinstance(content, dict):
        return {key: _with_manifests(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_with_manifests(value) for value in content]
    if isinstance(content, str) and "\0" not in content and (Path(content) / MANIFEST_FILE).is_file():
        return hashlib.sha256((Path(content) / MANIFEST_FILE).read_bytes()).hexdigest()
    return content


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
