"""The whole grid: data, then cells a few at a time, then the comparison.

Invariant: what is finished is kept and never run again; a failed cell is named with its log and stops no other.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.experiments.cell import StepFailed, collect, finished, make_data, run_cell, summary_names
from nextlat_dist.experiments.compare import compare, draw, summarise, table_of
from nextlat_dist.experiments.grid import Cell, Grid, cells_of, read_grid
from nextlat_dist.experiments.processes import Processes, locked
from nextlat_dist.reporting import report

GRID_FILE = "grid.yaml"  # a copy of the grid in its output directory
PICTURE = "ablations.png"


def ablate(
    config: Path,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    json_path: Path | None = None,
    picture_dir: Path | None = None,
) -> dict[str, Any]:
    """Run what is left of the grid in `config`, compare its cells and return the JSON's content.

    Args:
        output: directory of the data and of every cell; an interrupted or changed grid goes on from what it holds.
        seeds: in the place of the grid's own.
        jobs: cells at a time; each gets its share of this machine's cores.

    Raises:
        UserError: a grid or a cell's config that cannot be; an `output` that is no grid's, or in use; data that could
            not be made; no cell that finished.
    """
    grid = read_grid(config)
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1")
    cells = cells_of(grid, grid.seeds if seeds is None else seeds, output)
    if output.exists() and not (output / GRID_FILE).is_file():
        raise UserError(f"--output {output} exists and is no grid's directory; name a new one")
    output.mkdir(parents=True, exist_ok=True)
    with locked(output) as lock:
        shutil.copyfile(config, output / GRID_FILE)
        processes = Processes(lock, jobs)
        try:
            make_data(grid, output, processes)
        except StepFailed as failure:
            raise UserError(f"the grid's data could not be made, {failure}; see {failure.log}") from None
        failures = _run_cells(cells, grid, output, processes, jobs)
        content = _content(config, cells, grid, output, failures)
    if not content["rows"]:
        raise UserError(f"no cell finished; see {failures[0][1].log}")
    _show(content)
    if json_path is not None:
        report.write_json(json_path, content)
    if picture_dir is not None:
        draw(content["rows"], grid.headings, picture_dir / PICTURE)
    return content


def _run_cells(
    cells: Sequence[Cell], grid: Grid, output: Path, processes: Processes, jobs: int
) -> list[tuple[Cell, StepFailed]]:
    """Run all that are not finished; which ones failed, and how."""
    left = [cell for cell in cells if not finished(cell, grid, output)]
    print(f"{len(cells)} cells, {len(cells) - len(left)} of them finished before", file=sys.stderr, flush=True)
    progress = report.Progress("ablation", len(left), shown=True)
    failures = []
    with ThreadPoolExecutor(jobs) as threads:
        running = {threads.submit(run_cell, cell, grid, output, processes): cell for cell in left}
        try:
            for future in as_completed(running):
                cell = running[future]
                try:
                    print(f"{cell.name}: {future.result():.0f} s", file=sys.stderr, flush=True)
                except StepFailed as failure:
                    failures.append((cell, failure))
                    print(f"{cell.name}: {failure}; see {failure.log}", file=sys.stderr, flush=True)
                progress.add(cell.config.training.train_tokens)
        except BaseException:
            for future in running:
                future.cancel()
            processes.stop()
            raise
    return failures


def _content(
    config: Path, cells: Sequence[Cell], grid: Grid, output: Path, failures: Sequence[tuple[Cell, StepFailed]]
) -> dict[str, Any]:
    done = [cell for cell in cells if finished(cell, grid, output)]
    rows = []
    for cell in done:
        result = collect(cell, grid, output)
        rows.append({"variant": cell.variant, "seed": cell.seed, "seconds": result.seconds, **result.numbers})
    summary: dict[str, float] = {"cells_finished": len(done), "cells_failed": len(failures)}
    summary |= summarise(compare(rows, list(grid.headings)))
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    return report.envelope("nextlat ablate", {"grid": config.name, "seeds": seeds}, summary, rows) | {
        "headings": grid.headings,
        "variants": {name: dict(differences) for name, differences in grid.variants.items()},
        "failures": [
            {
                "variant": cell.variant,
                "seed": cell.seed,
                "step": failure.step,
                "log": str(failure.log.relative_to(output)),
            }
            for cell, failure in failures
        ],
        "missing": _missing(grid, rows, done),
    }


def _missing(grid: Grid, rows: Sequence[Mapping[str, Any]], done: Sequence[Cell]) -> dict[str, list[str]]:
    """Numbers that no finished cell has, each with the names that its summaries do have."""
    missing = {}
    for place in grid.headings:
        if not any(place in row for row in rows):
            kind = place.partition("/")[0]
            missing[place] = sorted({name for cell in done for name in summary_names(cell, kind)})
    return missing


def _show(content: Mapping[str, Any]) -> None:
    compared = compare(content["rows"], list(content["headings"]))
    print(report.table(*table_of(compared, content["headings"], content["rows"])))
    print("mean ± sample standard deviation over seeds")
    for place, names in content["missing"].items():
        print(f"no cell has {place}; there are {', '.join(names)}", file=sys.stderr)
    for failure in content["failures"]:
        print("failed: {variant}, seed {seed}, at {step}; see {log} in the output".format(**failure), file=sys.stderr)
