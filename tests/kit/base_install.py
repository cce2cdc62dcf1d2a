"""A virtual environment with the wheel and what the base install declares, and nothing else; no network needed.

The packages are links into the environment that runs the tests: the transitive closure of what is declared.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).parents[2]
SOURCES = ("nextlat_dist", "data_tools", "configs", "launch")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout, built from a copy of it."""
    source = folder / "source"
    for name in SOURCES:
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(CHECKOUT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True, text=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that `requirements` bring, with theirs."""
    found: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    seen = set()
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in metadata.requires(name) or []]
    return found


def base_environment(folder: Path, wheel: Path) -> Path:
    """The scripts' directory of a new virtual environment in `folder`."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    install = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "--quiet", "--no-deps"]
    # Without the path of the tests: pip would find the checkout's metadata there and install nothing.
    env = environment(venv / "bin")
    subprocess.run([*install, "--no-index", str(wheel)], check=True, capture_output=True, text=True, env=env)
    [installed] = site.glob("nextlat_dist-*.dist-info")
    declared = metadata.PathDistribution(installed).requires or []
    for name in closure([text for text in declared if "extra ==" not in text]):
        for entry in {Path(file.parts[0]) for file in metadata.files(name) or [] if file.parts[0] != ".."}:
            target = Path(str(metadata.distribution(name).locate_file(entry)))
            if entry.name != "__pycache__" and target.exists() and not (site / entry).exists():
                (site / entry).symlink_to(target)
    return venv / "bin"


def environment(scripts: Path) -> dict[str, str]:
    dropped = ("PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PATH": f"{scripts}:/usr/bin:/bin"}
