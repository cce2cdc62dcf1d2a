"""Directories in which the commands of the pages run, each kind made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.page_data import Prepare, checkout


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Prepare, Path], None]:
    """Fill a directory as `prepare` does, which runs once for all pages."""
    made: dict[str, Path] = {}

    def fill(prepare: Prepare, directory: Path) -> None:
        name = prepare.__name__
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            checkout(made[name])
            prepare(made[name])
        shutil.copytree(made[name], directory, symlinks=True, dirs_exist_ok=True)

    return fill
