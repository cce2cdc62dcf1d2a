"""The whole grid: data, then cells a few at a time, then the comparison.

Invariant: what is finished is kept and never run again; a failed cell is named with its log and stops no other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from nextlat_dist.config.locations import secret_urls
from nextlat_dist.data.storage.open import URLS_VARIABLE
from nextlat_dist.errors import UserError, without_secrets
from nextlat_dist.experiments.cell import collect, finished, make_data, run_cell, run_together, summary_names
from nextlat_dist.experiments.compare import compare, draw, summarise, table_of
from nextlat_dist.experiments.grid import Grid, GridCell, cells_of, read_grid
from nextlat_dist.experiments.processes import Processes, locked
from nextlat_dist.experiments.steps import StepFailed
from nextlat_dist.files import make_folder, write_whole, writing
from nextlat_dist.reporting.console import Progress, say
from nextlat_dist.reporting.report import Report
from nextlat_dist.reporting.tables import table

GRID_FILE = "grid.yaml"  # a copy of the grid in its output directory
PICTURE = "ablations.png"
Failures = Sequence[tuple[GridCell, StepFailed]]


def ablate(
    config: Path,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    jobs: int = 1,
    overrides: Sequence[str] = (),
    launcher: Sequence[str] = (),
) -> Report:
    """Run what is left of the grid in `config` and compare its cells.

    Args:
        output: directory of the data and of every cell; an interrupted or changed grid continues from what it holds.
        seeds: instead of the grid's own.
        jobs: cells at a time; each gets its share of this machine's cores.
        overrides: dotted settings of every cell, after the grid's.
        launcher: words that start a training when the path of its config is added; empty: `nextlat train --config`.

    Raises:
        UserError: a grid or a cell's config that cannot be; an `output` that is no grid's, or in use; data that could
            not be made; no cell that finished.
    """
    grid = read_grid(config)
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1")
    cells = cells_of(grid, grid.seeds if seeds is None else seeds, output, overrides)
    if output.exists() and not (output / GRID_FILE).is_file():
        raise UserError(f"--output {output} exists and is no grid's directory; name a new one")
    with writing(output):
        make_folder(output)
    with locked(output) as lock:
        write_whole(output / GRID_FILE, without_secrets(config.read_text(encoding="utf-8-sig")))
        # What the cells' files leave out: their trainings find it in the environment.
        urls = {url for cell in cells for url in secret_urls(cell.config)} | set(
            os.environ.get(URLS_VARIABLE, "").split()
        )
        processes = Processes(lock, jobs, {URLS_VARIABLE: " ".join(sorted(urls))})
        try:
            make_data(grid, output, processes)
            failures = _run_cells(cells, grid, output, processes, jobs, launcher)
            together = [] if failures else run_together(cells, grid, output, processes)
        except StepFailed as failure:
            raise UserError(f"{failure}; see {failure.log}") from None
        except BaseException:
            processes.stop()
            raise
        report = _report(config, cells, grid, output, failures, together)
    if not report.rows:
        raise UserError(f"no cell finished; see {failures[0][1].log}")
    return report


def _run_cells(
    cells: Sequence[GridCell],
    grid: Grid,
    output: Path,
    processes: Processes,
    jobs: int,
    launcher: Sequence[str],
) -> list[tuple[GridCell, StepFailed]]:
    """Run all that are not finished; which ones failed, and how."""
    left = [cell for cell in cells if not finished(cell, grid, output)]
    say(f"{len(cells)} cells, {len(cells) - len(left)} of them finished before", error=True)
    progress = Progress("ablation", len(left), shown=True)
    failures = []
    with ThreadPoolExecutor(jobs) as threads:
        running = {threads.submit(_run_one, cell, grid, output, processes, launcher): cell for cell in left}
        try:
            for future in as_completed(running):
                cell = running[future]
                try:
                    say(f"{cell.name}: {future.result():.0f} s", error=True)
                except StepFailed as failure:
                    failures.append((cell, failure))
                    say(f"{cell.name}: {failure}; see {failure.log}", error=True)
                progress.add(cell.config.training.train_tokens)
        except BaseException:
            for future in running:
                future.cancel()
            processes.stop()  # before the threads are waited for
            raise
    return failures


def _run_one(cell: GridCell, grid: Grid, output: Path, processes: Processes, launcher: Sequence[str]) -> float:
    say(f"{cell.name}: begins; its logs are in {cell.directory}", error=True)
    return run_cell(cell, grid, output, processes, launcher)


def _report(
    config: Path, cells: Sequence[GridCell], grid: Grid, output: Path, failures: Failures, together: Sequence[str]
) -> Report:
    done = [cell for cell in cells if finished(cell, grid, output)]
    rows: list[dict[str, Any]] = []
    for cell in done:
        result = collect(cell, grid, output)
        rows.append({"variant": cell.variant, "seed": cell.seed, "seconds": result.seconds, **result.numbers})
    compared = compare(rows, list(grid.headings))
    missing = _missing(grid, rows, done)
    failed = [
        {"variant": cell.variant, "seed": cell.seed, "step": failure.step, "log": str(failure.log.relative_to(output))}
        for cell, failure in failures
    ]
    remarks = [f"no cell has {number}; there are {', '.join(names)}" for number, names in missing.items()]
    line = "failed: {variant}, seed {seed}, at {step}; see {log} in the output"
    remarks += [line.format(**failure) for failure in failed]
    text = list(together)
    if grid.headings:
        text.append(table(*table_of(compared, grid.headings, rows)))
        text.append("mean ± sample standard deviation over seeds")
    return Report(
        command="nextlat ablate",
        options={"grid": config.name, "seeds": list(dict.fromkeys(cell.seed for cell in cells))},
        summary={"cells_finished": len(done), "cells_failed": len(failures)} | summarise(compared),
        rows=rows,
        extra={
            "headings": grid.headings,
            "variants": {name: dict(differences) for name, differences in grid.variants.items()},
            "failures": failed,
            "missing": missing,
        },
        text="\n".join(text),
        remarks=remarks,
        pictures={PICTURE: partial(draw, rows, grid.headings)} if grid.headings else {},
    )


def _missing(grid: Grid, rows: Sequence[Mapping[str, Any]], done: Sequence[GridCell]) -> dict[str, list[str]]:
    """Numbers that no finished cell has, each with the names that its summaries do have."""
    missing = {}
    for number in grid.headings:
        if not any(number in row for row in rows):
            kind = number.partition("/")[0]
            missing[number] = sorted({name for cell in done for name in summary_names(cell, kind)})
    return missing
