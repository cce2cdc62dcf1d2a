"""The shape of the project: which module may import which, and how large files and folders may be.

The contracts stand in pyproject.toml; `lint-imports` checks them. Here they are broken on purpose, in a copy.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


PACKAGES = ("nextlat_dist", "data_tools")
CATALOGUE = "nextlat_dist/objective/catalogue.py"


def modules(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(CHECKOUT))


def test_files_and_folders_are_small() -> None:
    """A file above 400 lines or, in the packages, a folder above 12 files is a missing folder."""
    tests = {name_of(path): len(path.read_text().splitlines()) for path in modules("tests", "examples")}
    assert {name: size for name, size in tests.items() if size > 400} == {}
    sizes = {path: len(path.read_text().splitlines()) for path in modules(*PACKAGES) if path.name != "__init__.py"}
    assert {name_of(path): size for path, size in sizes.items() if size > 400} == {}
    assert statistics.median(sizes.values()) <= 150
    folders = [path.parent for path in sizes]
    assert {name_of(folder) for folder in folders if folders.count(folder) > 12} == set()


def test_packages_say_what_they_are() -> None:
    packages = [path for path in modules(*PACKAGES) if path.name == "__init__.py"]
    assert [name_of(path) for path in packages if not ast.get_docstring(ast.parse(path.read_text()))] == []


QUESTION = re.compile(r"(What|Where|How|Who|Did)\b")


def test_modules_open_with_what_they_are() -> None:
    """A module opens with a noun phrase or a sentence that says what it is or does, not with a question."""
    assert QUESTION.match("What a run is.")
    assert not QUESTION.match("Whole files.")
    docstrings = {
        name_of(path): ast.get_docstring(ast.parse(path.read_text())) or "" for path in modules(*PACKAGES, "tests")
    }
    assert {name for name, text in docstrings.items() if QUESTION.match(text)} == set()


def prints(source: str) -> Iterator[int]:
    """Lines that call print."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno


def test_only_reporting_and_terminals_print() -> None:
    """Commands say what a person sees through `reporting.console`; ranks log through `reporting.log`."""
    assert list(prints("print(1)\nsay(2)\nx = [print(y) for y in z]\n")) == [1, 3]
    allowed = ("nextlat_dist/reporting/", "nextlat_dist/inference/terminal.py")
    found = {
        f"{name_of(path)}:{line}"
        for path in modules(*PACKAGES)
        if not name_of(path).startswith(allowed)
        for line in prints(path.read_text())
    }
    assert found == set()


def comparisons_of_objectives(source: str) -> Iterator[int]:
    """Lines that compare `objective.name`, or the name of an objective called otherwise, with ==, != or in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(
            isinstance(side, ast.Attribute) and side.attr == "name" and "objective" in ast.unparse(side.value)
            for side in (node.left, *node.comparators)
        ):
            yield node.lineno


def test_only_the_catalogue_compares_names_of_objectives() -> None:
    planted = "a = config.objective.name == 'mtp'\nb = self.objective.name in ('x',)\nc = task.name == 'hmm'\n"
    assert list(comparisons_of_objectives(planted)) == [1, 2]
    found = {
        f"{name_of(path)}:{line}"
        for path in modules(*PACKAGES)
        for line in comparisons_of_objectives(path.read_text())
        if name_of(path) != CATALOGUE
    }
    assert found == set()


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [LINT, "--no-cache"], cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=240
    )


def test_the_contracts_are_kept() -> None:
    result = lint(CHECKOUT)
    assert result.returncode == 0, result.stdout
    assert " 0 broken" in result.stdout


def copy(root: Path) -> None:
    for package in ("nextlat_dist", "data_tools"):
        shutil.copytree(CHECKOUT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CHECKOUT / "pyproject.toml", root)


@pytest.mark.parametrize(
    ("module", "wrong", "contract"),
    [
        ("nextlat_dist/parallel/dims.py", "nextlat_dist.objective", "Arrows point one way"),
        ("nextlat_dist/errors.py", "nextlat_dist.files", "Arrows point one way"),
        ("nextlat_dist/data/packing.py", "nextlat_dist.config.schema", "Arrows point one way"),
        ("nextlat_dist/data/order.py", "nextlat_dist.data.loader", "No circles"),
        ("nextlat_dist/inference/state_model.py", "nextlat_dist.model.attention", "An exported model runs without"),
        ("nextlat_dist/inference/sampling.py", "deepspeed", "An exported model runs without"),
        ("nextlat_dist/huggingface/weights.py", "deepspeed", "Exporting needs neither"),
        ("nextlat_dist/tasks/hmm.py", "torch", "need no torch"),
        ("data_tools/verify.py", "nextlat_dist.inference", "Data tools know data and tasks"),
        ("nextlat_dist/experiments/grid.py", "nextlat_dist.training.loop", "Experiments start commands"),
    ],
    ids=lambda value: value.replace("/", "."),
)
def test_a_wrong_import_breaks_its_contract(tmp_path: Path, module: str, wrong: str, contract: str) -> None:
    copy(tmp_path)
    path = tmp_path / module
    path.write_text(f"{path.read_text()}\n\ndef planted() -> None:\n    import {wrong}  # noqa: F401\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    broken = [line for line in result.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), result.stdout


def test_a_package_without_a_layer_is_noticed(tmp_path: Path) -> None:
    copy(tmp_path)
    (tmp_path / "nextlat_dist/misc").mkdir()
    (tmp_path / "nextlat_dist/misc/__init__.py").touch()
    result = lint(tmp_path)
    assert result.returncode == 1
    assert "misc" in result.stdout
