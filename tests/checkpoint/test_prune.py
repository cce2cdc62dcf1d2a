"""Which checkpoints are kept, and that a deletion cut short leaves none that looks whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.checkpoint.commit import LATEST, MANIFEST, find_checkpoint, prune, step_name
from nextlat_dist.errors import UserError


def refusal(action: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        action(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make(root: Path, *names: str, latest: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "data").write_text("x")
        if not name.endswith("broken"):
            (root / name / MANIFEST).write_text("{}")
    (root / LATEST).write_text(latest + "\n")


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step_*"))


def test_prune_keeps_the_newest_and_removes_abandoned_saves(tmp_path: Path) -> None:
    steps = [step_name(step) for step in (1, 2, 3, 10)]
    make(tmp_path, *steps, step_name(4) + ".writing", step_name(5) + "broken", latest=step_name(10))
    (tmp_path / "notes").mkdir()
    prune(tmp_path, 2)
    assert kept(tmp_path) == [step_name(3), step_name(10)]
    assert (tmp_path / "notes").is_dir()
    prune(tmp_path, 1)
    assert kept(tmp_path) == [step_name(10)]


def test_prune_keeps_every_so_many_steps(tmp_path: Path) -> None:
    make(tmp_path, *(step_name(step) for step in (50, 100, 150, 200, 250)), latest=step_name(250))
    prune(tmp_path, 1, keep_every=100)
    assert kept(tmp_path) == [step_name(100), step_name(200), step_name(250)]


def test_prune_keeps_what_latest_names(tmp_path: Path) -> None:
    make(tmp_path, *(step_name(step) for step in (1, 2, 3)), latest=step_name(1))
    prune(tmp_path, 1)
    assert kept(tmp_path) == [step_name(1), step_name(3)]


def test_an_abandoned_save_takes_no_ones_place(tmp_path: Path) -> None:
    """Stopped just before its rename, it has a manifest and the highest number."""
    make(tmp_path, step_name(1), step_name(2), step_name(9) + ".writing", latest=step_name(2))
    prune(tmp_path, 2)
    assert kept(tmp_path) == [step_name(1), step_name(2)]


def test_a_deletion_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, step_name(1), step_name(2), latest=step_name(2))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it removed anything
    prune(tmp_path, 1)
    assert (tmp_path / step_name(1) / "data").is_file()
    assert "half-written" in refusal(find_checkpoint, tmp_path / step_name(1))
    assert find_checkpoint(tmp_path) == tmp_path / step_name(2)
