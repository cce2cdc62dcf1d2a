"""Versions, accelerator and half-done builds of extensions; nothing is imported to find out."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from nextlat_dist.config.shipped import shipped_root
from nextlat_dist.doctor.findings import Finding, note, ok, problem
from nextlat_dist.doctor.gpus import visible_gpus

PROJECT = "nextlat-dist"
BUILD_SECONDS = 600  # a younger lock may be held by a process that is not seen from here: in a container, on a host
SET_UP = "run bash launch/setup.sh"
INSTALL = f"{SET_UP}, or pip install '{PROJECT}[train]'"


def check_python() -> Finding:
    """This interpreter against the range that the project declares."""
    version = platform.python_version()
    wanted = metadata.metadata(PROJECT)["Requires-Python"]
    if version in SpecifierSet(wanted):
        return ok("python", f"Python {version} (needs {wanted})")
    return problem("python", f"Python {version} runs this, the project needs {wanted}: set PYTHON and {SET_UP}")


def check_packages(requirements: Sequence[str] | None = None, constraints: Path | None = None) -> list[Finding]:
    """Installed versions against `requirements` and against the tested set.

    Args:
        requirements: None: the project's own, with those of training.
        constraints: the tested versions; None: those that are shipped.
    """
    wanted = [
        Requirement(text) for text in (metadata.requires(PROJECT) or [] if requirements is None else requirements)
    ]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": "train"})]
    tested = _tested_versions(constraints or shipped_root() / "launch/constraints.txt")
    findings, different = [], []
    for requirement in wanted:
        name = requirement.name
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(problem("packages", f"{name} is not installed, training needs {requirement}: {INSTALL}"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            text = f"{name} {version} is installed, this project needs {requirement}: {SET_UP}"
            findings.append(problem("packages", text))
        elif name in tested and version.partition("+")[0] != tested[name]:
            different.append(f"{name} {version} (tested: {tested[name]})")
    if different:
        findings.append(note("packages", f"not the versions of launch/constraints.txt: {', '.join(different)}"))
    return findings or [ok("packages", f"{len(wanted)} packages in the ranges that the project declares")]


def _tested_versions(constraints: Path) -> dict[str, str]:
    if not constraints.is_file():
        return {}
    return dict(line.split("==") for line in constraints.read_text().splitlines() if "==" in line)


def gpus() -> list[str]:
    """The GPUs that this process may use, as the driver names them."""
    if shutil.which("nvidia-smi") is None:
        return []
    result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return visible_gpus(result.stdout, os.environ.get("CUDA_VISIBLE_DEVICES"))


def check_accelerator(found: Sequence[str], quick: bool) -> Finding:
    """GPUs need a torch built for them; without `quick`, torch itself is asked."""
    version = metadata.version("torch")
    if not found:
        return ok("accelerator", f"no GPU: ranks run on the CPU with gloo (torch {version})")
    count = f"{len(found)} GPU{'s' if len(found) > 1 else ''}"
    usable = not version.endswith("+cpu")
    if usable and not quick:
        import torch

        usable = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    if usable:
        return ok("accelerator", f"{count} with NCCL (torch {version}): {found[0]}")
    return problem(
        "accelerator",
        f"this host has {count}, but torch {version} cannot use them: install a torch built for CUDA that the driver "
        "supports, or hide them with CUDA_VISIBLE_DEVICES=''",
    )


def check_extensions(directory: Path) -> Finding:
    """No lock in `directory`, where torch builds extensions, that nobody holds: a build would wait for it in silence.

    Training itself builds none; a raw `deepspeed:` setting may.
    """
    held = []
    for lock in sorted(directory.glob("*/lock")):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue
        if age > BUILD_SECONDS and not _is_open(lock):
            text = f"{lock} was left by a build that was killed, and every later one would wait for it: delete it"
            return problem("extensions", text)
        held.append(str(lock))
    if held:
        return note("extensions", f"another process holds {', '.join(held)}: a build of the same will wait for it")
    return ok("extensions", "no build is under way or was left half done")


def extension_directory() -> Path:
    """Where torch builds extensions; the launch scripts choose a folder in the virtual environment."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions")))


def _is_open(path: Path) -> bool:
    """Whether a process has `path` open: torch keeps a lock file open for as long as it holds it."""
    wanted = str(path.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == wanted:
                return True
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    return False
