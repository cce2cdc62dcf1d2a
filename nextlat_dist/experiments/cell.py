"""The steps of one cell: train, export, each evaluation; and those of the whole grid: its data, evaluations of all."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.config.load import config_to_dict, dump_config
from nextlat_dist.experiments.grid import DATA, TRAINING, Evaluation, Grid, GridCell, exports_read
from nextlat_dist.experiments.processes import Processes
from nextlat_dist.experiments.steps import Step, hash_of, is_done, run_step, stamp, with_manifests
from nextlat_dist.files import CONFIG_FILE, METRICS_FILE

NEXTLAT = (sys.executable, "-m", "nextlat_dist.cli")
NEXTLAT_DATA = (sys.executable, "-m", "data_tools.cli")


@dataclass(frozen=True)
class CellResult:
    """Numbers of a finished cell, `evaluation/name` → value; what its summary lacks is left out."""

    numbers: dict[str, float]
    seconds: float


def make_data(grid: Grid, output: Path, processes: Processes) -> None:
    """Write the grid's data into `output`/data unless they are there. Raises StepFailed."""
    for step in _data_steps(grid, output):
        if not is_done(output, step):
            run_step(step, output, processes)


def _data_steps(grid: Grid, output: Path) -> Iterator[Step]:
    """Each depends on those before it."""
    before: list[list[str]] = []
    commands = {DATA: grid.data, **grid.then} if grid.data else grid.then
    for name, words in commands.items():
        given = _words(words)
        before.append(given)
        filled = _fill(words, output)
        written = [Path(filled[at + 1]) for at, word in enumerate(filled[:-1]) if word == "--output"]
        key = hash_of(given if name == DATA else before)
        yield Step(name, (*NEXTLAT_DATA, *filled), key, outputs=(output / DATA,) if name == DATA else tuple(written))


def run_cell(cell: GridCell, grid: Grid, output: Path, processes: Processes, launcher: Sequence[str] = ()) -> float:
    """Run what is left of the cell; the seconds of all its steps, whenever they ran. Raises StepFailed.

    Args:
        launcher: words that start a training when the path of its config is added; empty: `nextlat train --config`.
    """
    for step in steps_of(cell, grid, output, launcher):
        if not is_done(cell.directory, step):
            run_step(step, cell.directory, processes)
    return _seconds(cell, grid, output)


def finished(cell: GridCell, grid: Grid, output: Path) -> bool:
    return all(is_done(cell.directory, step) for step in steps_of(cell, grid, output))


def steps_of(cell: GridCell, grid: Grid, output: Path, launcher: Sequence[str] = ()) -> Iterator[Step]:
    """In order; the data must be there, for keys hold the hashes of manifests."""
    content = config_to_dict(cell.config)
    del content["output_dir"]
    key = hash_of(with_manifests(content))
    config = cell.directory / CONFIG_FILE
    yield Step(
        "train",
        (*(launcher or (*NEXTLAT, "train", "--config")), str(config)),
        key,
        outputs=(cell.run,),
        inputs={config: dump_config(cell.config)},
        resumes=True,
    )
    export = ("export", "--checkpoint", "{run}/checkpoints", "--output", "{export}")
    key = hash_of([key, *export])
    yield Step("export", (*NEXTLAT, *_fill(export, output, cell)), key, outputs=(cell.export,))
    made: dict[str, str] = {}  # the key of each derived export
    for name, asked in grid.exports.items():
        if cell.variant in grid.variants_of(asked):
            words = asked.arguments
            made[name] = hash_of([key, *_hashed(words, output), *(made[one] for one in exports_read(grid, words))])
            path = derived(cell, name)
            command = (*NEXTLAT, *_fill(words, output, cell, made), "--output", str(path))
            yield Step(name, command, made[name], outputs=(path,))
    for name, evaluation in _asked(cell, grid).items():
        words, json_path = evaluation.arguments, cell.directory / f"{name}.json"
        command = (*NEXTLAT, "evaluate", *_fill(words, output, cell, made), "--json", str(json_path))
        read = [made[one] for one in exports_read(grid, words)]
        yield Step(name, command, hash_of([key, *_hashed(words, output), *read]), outputs=(json_path,))


def _hashed(words: Sequence[Any], output: Path) -> list[str]:
    """Words of a command, with datasets by their content."""
    found: list[str] = with_manifests([word.replace("{data}", str(output / "data")) for word in _words(words)])
    return found


def derived(cell: GridCell, name: str) -> Path:
    """Where a cell's derived export of that name is."""
    return cell.export.with_name(name)


def _asked(cell: GridCell, grid: Grid) -> dict[str, Evaluation]:
    """The evaluations of this cell's variant."""
    return {name: own for name, own in grid.evaluations.items() if cell.variant in grid.variants_of(own)}


def steps_together(cells: Sequence[GridCell], grid: Grid, output: Path) -> Iterator[Step]:
    """Evaluations of all cells, which must be finished."""
    keys = [step.key for cell in cells for step in steps_of(cell, grid, output) if step.name == "export"]
    exports = [f"{cell.variant}={cell.export}" for cell in cells]
    for name, arguments in grid.together.items():
        given = _hashed(arguments, output)
        words = [filled for word in _fill(arguments, output) for filled in (exports if word == "{exports}" else [word])]
        json_path = output / f"{name}.json"
        yield Step(
            name,
            (*NEXTLAT, "evaluate", *words, "--json", str(json_path)),
            hash_of([[cell.variant for cell in cells], keys, given]),
            outputs=(json_path,),
            stdout=output / f"{name}.txt",
        )


def run_together(cells: Sequence[GridCell], grid: Grid, output: Path, processes: Processes) -> list[str]:
    """What the evaluations of all cells say, from now or from before. Raises StepFailed."""
    texts = []
    for step in steps_together(cells, grid, output):
        if not is_done(output, step):
            run_step(step, output, processes)
        assert step.stdout is not None
        texts.append(step.stdout.read_text().rstrip())
    return texts


def collect(cell: GridCell, grid: Grid, output: Path) -> CellResult:
    """What the grid asks for of a finished cell."""
    summaries = {kind: _summary(cell, kind) for kind in (TRAINING, *_asked(cell, grid))}
    numbers = {}
    for number in grid.headings:
        kind, _, name = number.partition("/")
        if summaries.get(kind, {}).get(name) is not None:
            numbers[number] = float(summaries[kind][name])
    return CellResult(numbers, _seconds(cell, grid, output))


def summary_names(cell: GridCell, kind: str) -> list[str]:
    """Names of the numbers that a finished cell has of an evaluation, or of its training; of one not asked, none."""
    if kind != TRAINING and not (cell.directory / f"{kind}.json").is_file():
        return []
    return [name for name, value in _summary(cell, kind).items() if isinstance(value, (int, float))]


def _summary(cell: GridCell, kind: str) -> dict[str, Any]:
    """An evaluation's summary; of the training the last value of every field that it logged, and `step_seconds`, the
    median over what it logged.
    """
    if kind == TRAINING:
        lines = [json.loads(line) for line in (cell.run / METRICS_FILE).read_text().splitlines()]
        fields: dict[str, Any] = {name: value for line in lines for name, value in line.items()}
        timed = [line for line in lines if line.get("tokens_per_second")]
        if timed:
            seconds = [line["tokens"] / line["step"] / line["tokens_per_second"] for line in timed]
            fields["step_seconds"] = statistics.median(seconds)
        return fields
    summary: dict[str, Any] = json.loads((cell.directory / f"{kind}.json").read_text())["summary"]
    return summary


def _seconds(cell: GridCell, grid: Grid, output: Path) -> float:
    stamps = [stamp(cell.directory, step) for step in steps_of(cell, grid, output)]
    return round(sum(found["seconds"] for found in stamps if found is not None), 1)


def _fill(
    words: Sequence[Any], output: Path, cell: GridCell | None = None, made: Collection[str] = ()
) -> tuple[str, ...]:
    paths = {"{data}": output / "data", "{output}": output}
    if cell is not None:
        paths |= {"{run}": cell.run, "{export}": cell.export}
        paths |= {f"{{{name}}}": derived(cell, name) for name in made}
    filled = _words(words)
    for placeholder, path in paths.items():
        filled = [word.replace(placeholder, str(path)) for word in filled]
    return tuple(filled)


def _words(given: Sequence[Any]) -> list[str]:
    return [str(word) for word in given]
