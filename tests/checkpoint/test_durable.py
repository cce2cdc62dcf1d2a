"""The durability of checkpoints: at a rename all that gets its name is on disk, and one of the same step stays until
then."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextlat_dist import files
from nextlat_dist.checkpoint.commit import LATEST, commit, step_name, verify, write_alone
from tests.kit.harness import Ranks
from tests.kit.system import Flushes


def save(root: Path, step: int) -> None:
    def write(directory: Path) -> list[str]:
        (directory / "parts").mkdir()
        (directory / "parts" / "rank0.bin").write_bytes(bytes(1000 + step))
        (directory / "rank0.txt").write_text(f"step {step}")
        return ["parts/rank0.bin", "rank0.txt"]

    commit(root, step, {}, write)


def save_watched(root: Path) -> list[str]:
    """Commit two checkpoints, the second over a damaged one; the names that were given, in order."""
    with pytest.MonkeyPatch.context() as patch:
        flushes = Flushes(patch)
        save(root, 3)
        (root / step_name(6) / "parts").mkdir(parents=True)
        save(root, 6)
        flushes.assert_on_disk(root)
        flushes.assert_names_on_disk()
        return flushes.renamed


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path: Path, one_rank: Ranks) -> None:
    """Files, folders, manifest, then the name; the pointer only once that name is on disk."""
    (renamed,) = one_rank.run(save_watched, tmp_path / "new" / "checkpoints")
    assert renamed == [step_name(3), LATEST, LATEST]  # two folders swap names without os.rename


def test_a_copy_of_a_checkpoint_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(directory: Path) -> list[str]:
        (directory / "inner").mkdir()
        (directory / "inner" / "file").write_text("content")
        return ["inner/file"]

    flushes = Flushes(monkeypatch)
    write_alone(tmp_path / "copy", 4, {}, write)
    assert flushes.renamed == [step_name(4), LATEST]
    flushes.assert_on_disk(tmp_path)
    flushes.assert_names_on_disk()


def test_an_older_checkpoint_of_the_same_step_is_replaced_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between removing and renaming, a run would have no checkpoint that its pointer names."""
    contents = iter(["before", "after"])

    def write(directory: Path) -> list[str]:
        (directory / "file").write_text(next(contents))
        return ["file"]

    target = write_alone(tmp_path, 4, {}, write)
    removed: list[tuple[str, str]] = []
    original = files.remove
    seen = lambda path: (removed.append((path.name, (target / "file").read_text())), original(path))[1]  # noqa: E731
    monkeypatch.setattr(files, "remove", seen)
    write_alone(tmp_path, 4, {}, write)
    assert removed == [(step_name(4) + ".writing", "after")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, step_name(4)]
    verify(target)
