"""Adds `configs/` and `launch/` to a wheel, as `nextlat_dist/_shipped`; everything else stands in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "launch")


class BuildWithShippedFiles(build_py):
    """An editable install has the folders themselves."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "nextlat_dist", "_shipped", name)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithShippedFiles})
