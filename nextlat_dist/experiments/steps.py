"""Keyed steps: commands that are run once for what they depend on, each a process with a log and a stamp.

    step = Step("export", ("nextlat", "export", …), key=hash_of([…]), outputs=(directory,))
    if not is_done(directory, step):
        run_step(step, directory, processes)

A step's key is a hash of what decides its result: its settings, the manifests of its datasets, the keys of the steps
before it. Next to the log stand `NAME.key`, written before the command starts, and `NAME.done`, written once it ended
well. Invariant: a step whose stamp has its key and whose outputs are there is never run again, any other is; under
another key it starts from nothing, under its own an interrupted one that resumes keeps what it has; and nothing is
removed that no step wrote.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextlat_dist.data.shard_format import MANIFEST_FILE
from nextlat_dist.experiments.processes import Processes
from nextlat_dist.files import write_whole
from nextlat_dist.reporting.console import say


class StepFailed(Exception):
    """A step's process ended with another status than 0, or did not write what it should have."""

    def __init__(self, step: str, reason: str, log: Path) -> None:
        self.step, self.log = step, log
        super().__init__(f"{step} {reason}")


@dataclass(frozen=True)
class Step:
    """Attributes:
    key: hash of what decides the result.
    outputs: files and directories that it writes; removed before it starts from nothing.
    inputs: files that are written for it, with their text.
    resumes: continues from its own outputs after an interruption.
    """

    name: str
    command: tuple[str, ...]
    key: str
    outputs: tuple[Path, ...] = ()
    inputs: Mapping[Path, str] = field(default_factory=dict)
    resumes: bool = False
    stdout: Path | None = None


def is_done(directory: Path, step: Step) -> bool:
    return stamp(directory, step) is not None


def stamp(directory: Path, step: Step) -> dict[str, Any] | None:
    """`{"key", "seconds"}` of a finished step, None where it is to be run."""
    file = directory / f"{step.name}.done"
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    there = all(output.exists() for output in step.outputs)
    return content if there and content.get("key") == step.key else None


def run_step(step: Step, directory: Path, processes: Processes) -> None:
    """Run it to its stamp, with a log in `directory`. Raises StepFailed."""
    directory.mkdir(parents=True, exist_ok=True)
    log, started = directory / f"{step.name}.log", directory / f"{step.name}.key"
    _make_way(step, directory, started, log)
    for path, text in step.inputs.items():
        write_whole(path, text)
    write_whole(started, step.key)
    start = time.monotonic()
    with log.open("ab") as stream, (step.stdout or log).open("wb" if step.stdout else "ab") as stdout:
        status = processes.run(step.command, stream, stdout, _teller(step, log))
    if status != 0:
        raise StepFailed(step.name, f"ended with status {status}: {_last_line(log)}", log)
    missing = [str(output) for output in step.outputs if not output.exists()]
    if missing:
        raise StepFailed(step.name, f"ended without writing {missing[0]}: {_last_line(log)}", log)
    content = {"key": step.key, "seconds": time.monotonic() - start}
    write_whole(directory / f"{step.name}.done", json.dumps(content))


def _teller(step: Step, log: Path) -> Callable[[], None]:
    """Says the last line of a running step's log: its progress; nothing where it said nothing new."""
    said = [_last_line(log)]

    def tell() -> None:
        line = _last_line(log)
        if line != said[-1]:
            said[:] = [line]
            # The cell's folders tell jobs apart that run at the same time.
            say(f"{log.parent.parent.name}/{log.parent.name} {step.name}: {line}", error=True)

    return tell


def _make_way(step: Step, directory: Path, started: Path, log: Path) -> None:
    """Remove outputs of another key, or of an interrupted step that cannot resume."""
    known = started.is_file() or (directory / f"{step.name}.done").is_file()
    if step.resumes and started.is_file() and started.read_text() == step.key:
        return
    for output in step.outputs:
        if not output.exists():
            continue
        if not known:
            raise StepFailed(step.name, f"would replace {output}, which it did not write: move that away", log)
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def with_manifests(content: Any) -> Any:
    """`content` with every path of a local dataset replaced by the hash of its manifest."""
    if isinstance(content, dict):
        return {key: with_manifests(value) for key, value in content.items()}
    if isinstance(content, list):
        return [with_manifests(value) for value in content]
    if isinstance(content, str) and "\0" not in content and (Path(content) / MANIFEST_FILE).is_file():
        return hashlib.sha256((Path(content) / MANIFEST_FILE).read_bytes()).hexdigest()
    return content
