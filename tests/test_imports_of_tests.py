"""Shared code of tests lies in `tests/kit`: no test module imports another one, and a conftest is imported by none."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def foreign_imports(source: str) -> list[str]:
    """Modules of `tests` outside the kit that the source imports, absolutely or relatively, at any depth."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.append("." * node.level + (node.module or ""))
            elif node.module == "tests":
                found += [f"tests.{alias.name}" for alias in node.names]
            else:
                found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [
        name for name in found if name.startswith((".", "tests.")) and not (name == "tests.kit" or "tests.kit." in name)
    ]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tests.data.test_loader import loader", ["tests.data.test_loader"]),
        ("def f():\n    import tests.launch.conftest", ["tests.launch.conftest"]),
        ("from . import test_loader", ["."]),
        ("from tests import data", ["tests.data"]),
        ("from tests import kit\nfrom tests.kit import jobs\nimport tests.kit.harness, numpy", []),
    ],
)
def test_an_import_from_a_test_is_found(source: str, found: list[str]) -> None:
    assert foreign_imports(source) == found


def test_no_test_imports_another() -> None:
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 100
    found = {str(file.relative_to(TESTS)): foreign_imports(file.read_text()) for file in files}
    assert {name: names for name, names in found.items() if names} == {}
