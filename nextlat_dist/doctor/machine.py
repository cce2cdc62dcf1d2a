"""This host's disk, limits and threads."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from pathlib import Path

from nextlat_dist.checkpoint.run_lock import in_use
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.doctor.findings import Finding, note, ok, problem
from nextlat_dist.files import CHECKPOINT_NAME, CHECKPOINTS_FOLDER
from nextlat_dist.plan.counting import parameter_counts

BYTES_PER_PARAMETER = 12  # fp32 master weight and two Adam moments
OPEN_FILES = 1024
SHARED_MEMORY_BYTES = 512 * 2**20


def checkpoint_bytes(config: RunConfig) -> int:
    """Estimated size of one checkpoint; the embedding and the head are stored with their padding."""
    model = config.model
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size * (1 if model.tie_embeddings else 2)
    return BYTES_PER_PARAMETER * (parameter_counts(config)["total"] + padding)


def existing_parent(directory: Path) -> Path:
    """`directory`, or the nearest directory above it that exists."""
    directory = directory.absolute()
    while not directory.is_dir():
        directory = directory.parent
    return directory


def check_output_dir(config: RunConfig, strict: bool = False) -> Finding:
    """A file can be made where the run will write, and no other run writes there.

    A run that may be dead is a note, since training waits until its heartbeat has told; a problem where `strict`.
    """
    use = in_use(Path(config.output_dir))
    if use is not None and (use.certain or strict):
        return problem("output_dir", use.text)
    parent = existing_parent(Path(config.output_dir))
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".doctor-"):
            if use is not None:
                return note("output_dir", f"{use.text}; training waits until it shows that it lives, or counts as dead")
            return ok("output_dir", f"{config.output_dir} can be written")
    except OSError as error:
        return problem(
            "output_dir",
            f"output_dir={config.output_dir} cannot be written: {error.strerror} in {parent}; allow it or change "
            "output_dir",
        )


def check_disk(config: RunConfig) -> Finding:
    """Disk for the checkpoints that will lie there at one time: `keep_last` and the one being written."""
    directory, keep = Path(config.output_dir), config.checkpoint.keep_last
    parent = existing_parent(directory)
    free, size = shutil.disk_usage(parent).free, checkpoint_bytes(config)
    names = [path.name for path in (directory / CHECKPOINTS_FOLDER).glob("*")]
    there = sum(CHECKPOINT_NAME.fullmatch(name) is not None for name in names)
    needed = size * max(1, keep + 1 - there)
    if free >= needed:
        return ok("disk", f"{_gb(free)} free in {parent}, {_gb(needed)} needed for checkpoints of {_gb(size)}")
    return problem(
        "disk",
        f"{parent} has {_gb(free)} free, but checkpoint.keep_last={keep} and the one being written need {_gb(needed)} "
        f"({_gb(size)} each): free some, or change output_dir or checkpoint.keep_last",
    )


def check_open_files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return ok("open files", f"limit {limit}")
    return problem(
        "open files", f"a process may open {limit} files, a rank needs up to {OPEN_FILES}: ulimit -n {OPEN_FILES}"
    )


def check_shared_memory(has_gpus: bool, directory: Path = Path("/dev/shm")) -> Finding:
    """Ranks of one host exchange data through it."""
    size = shutil.disk_usage(directory).total if directory.is_dir() else 0
    if size >= SHARED_MEMORY_BYTES:
        return ok("shared memory", f"{directory} has {_gb(size)}")
    text = (
        f"{directory} has {_gb(size)}, {_gb(SHARED_MEMORY_BYTES)} are needed between the ranks of a host: make it "
        "larger (Docker: --shm-size=8g; Kubernetes: an emptyDir in memory there)"
    )
    return problem("shared memory", text) if has_gpus else note("shared memory", text)


def check_threads() -> Finding:
    value = os.environ.get("OMP_NUM_THREADS")
    if value is None:
        return note("threads", "OMP_NUM_THREADS is not set: every rank would use all cores (the launch scripts set 1)")
    if not value.isdigit() or int(value) < 1:
        return problem("threads", f"OMP_NUM_THREADS={value} must be a positive number of threads per rank")
    return ok("threads", f"OMP_NUM_THREADS={value}")


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
