"""Which checkpoints are kept, and that a deletion cut short leaves none that looks whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.checkpoint import commit as protocol
from nextlat_dist.checkpoint.commit import LATEST, MANIFEST, committed, find_checkpoint, prune, step_name
from nextlat_dist.errors import UserError
from nextlat_dist.files import remove
from tests.kit.harness import Ranks
from tests.kit.system import access_as_written


def refusal(action: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        action(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make(root: Path, *names: str, latest: str, broken: str = "") -> None:
    for name in (*names, broken) if broken else names:
        (root / name).mkdir(parents=True)
        (root / name / "data").write_text("x")
        if name != broken:
            (root / name / MANIFEST).write_text("{}")
    (root / LATEST).write_text(latest + "\n")


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step_*"))


def test_prune_keeps_the_newest_and_removes_abandoned_saves(tmp_path: Path) -> None:
    steps = [step_name(step) for step in (1, 2, 3, 10)]
    make(tmp_path, *steps, step_name(4) + ".writing", broken=step_name(5), latest=step_name(10))
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


# What is not ours.

FOREIGN = [
    "step_00000002-best",
    "step_00000002-hf",
    "step_00000002.bak",
    "step_by_step_notes",
    "step_",
    "step_00000002 (copy)",
    "step_00000003-best.writing",
    "step_٣",
    "old_step_00000002",
]


@pytest.mark.parametrize("keep_every", [0, 10])
def test_only_what_a_commit_names_is_deleted(tmp_path: Path, keep_every: int) -> None:
    make(tmp_path, *map(step_name, (2, 10, 15, 20)), *FOREIGN, latest=step_name(20))
    (tmp_path / "step_00000003").write_text("a file of this name")
    assert prune(tmp_path, 1, keep_every) == {}
    left = {path.name for path in tmp_path.iterdir()} - {LATEST}
    assert left == {*FOREIGN, "step_00000003", step_name(20)} | ({step_name(10)} if keep_every else set())
    assert all((tmp_path / name / "data").is_file() for name in FOREIGN)
    assert committed(tmp_path)[-1] == find_checkpoint(tmp_path) == tmp_path / step_name(20)


def test_a_link_and_what_it_names_stay(tmp_path: Path) -> None:
    """A checkpoint that was moved to another disk and linked."""
    root = tmp_path / "checkpoints"
    make(root, step_name(2), step_name(3), latest=step_name(3))
    elsewhere = tmp_path / "disk"
    (root / step_name(2)).rename(elsewhere)
    (root / step_name(2)).symlink_to(elsewhere)
    (root / (step_name(1) + ".writing")).symlink_to(elsewhere)
    assert prune(root, 1) == {}
    assert (root / step_name(2)).is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["data", MANIFEST]
    assert find_checkpoint(root / step_name(2)) == root / step_name(2)


def test_steps_are_numbers_not_words(tmp_path: Path) -> None:
    make(tmp_path, "step_99999999", "step_100000000", latest="step_100000000")
    assert [path.name for path in committed(tmp_path)] == ["step_99999999", "step_100000000"]
    prune(tmp_path, 1)
    assert kept(tmp_path) == ["step_100000000"]


# What cannot be deleted.


def test_what_cannot_be_deleted_is_named_and_the_rest_goes(tmp_path: Path) -> None:
    make(tmp_path, *map(step_name, (1, 2, 3, 4)), latest=step_name(4))
    for name, mode in ((step_name(1), 0o555), (step_name(2), 0o755)):
        (tmp_path / name / "inner").mkdir()
        (tmp_path / name / "inner" / "file").write_text("x")
        (tmp_path / name / "inner").chmod(0o555)
        (tmp_path / name).chmod(mode)
    with access_as_written():
        refused = prune(tmp_path, 1)
    assert refused.keys() == {step_name(1), step_name(2)}
    assert all(reason.startswith("Permission denied: ") for reason in refused.values())
    assert (tmp_path / step_name(1) / MANIFEST).is_file(), "still whole: nothing of it could go"
    assert not (tmp_path / step_name(2) / MANIFEST).exists(), "no longer a checkpoint"
    assert kept(tmp_path) == [step_name(1), step_name(2), step_name(4)]
    assert find_checkpoint(tmp_path) == tmp_path / step_name(4)


def saves_with_something_that_stays(root: Path) -> tuple[list[str], list[str]]:
    """Outcomes of three saves where an old checkpoint cannot be deleted; what was warned of."""
    from nextlat_dist.checkpoint import writer as module
    from nextlat_dist.checkpoint.writer import CheckpointWriter, Snapshot

    warned: list[str] = []
    original = module.log.warning
    module.log.warning = lambda text, *words: warned.append(text % words)  # type: ignore[method-assign, assignment]
    try:
        with access_as_written():
            writer = CheckpointWriter(root, keep_last=1, keep_every=0, background=False)
            for step in (2, 3, 4):
                writer.save(step, {}, lambda: Snapshot("tp0_pp0_dp0", [], {"file": b"content"}))
            outcomes = [outcome.error for outcome in writer.finish()]
            writer.close()
    finally:
        module.log.warning = original  # type: ignore[method-assign]
    return outcomes, warned


def test_a_run_goes_on_when_an_old_checkpoint_cannot_be_deleted(tmp_path: Path, one_rank: Ranks) -> None:
    make(tmp_path, step_name(1), latest=step_name(1))
    (tmp_path / step_name(1)).chmod(0o555)
    ((outcomes, warned),) = one_rank.run(saves_with_something_that_stays, tmp_path)
    assert outcomes == ["", "", ""]
    (warning,) = warned  # once, not at every save
    assert f"{tmp_path / step_name(1)} cannot be deleted (Permission denied" in warning
    assert kept(tmp_path) == [step_name(1), step_name(4)]
    assert find_checkpoint(tmp_path) == tmp_path / step_name(4)


# While a run saves.


def test_the_command_leaves_a_save_in_flight(tmp_path: Path) -> None:
    make(tmp_path, *map(step_name, (1, 2, 3)), step_name(4) + ".writing", latest=step_name(3))
    assert prune(tmp_path, 1, abandoned=False) == {}
    assert kept(tmp_path) == [step_name(3), step_name(4) + ".writing"]
    assert (tmp_path / (step_name(4) + ".writing") / "data").is_file()


def test_what_is_committed_during_a_deletion_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *map(step_name, (1, 2, 3)), latest=step_name(3))

    def removed(path: Path) -> str:
        if not (tmp_path / step_name(4)).exists():  # the run commits in between
            make(tmp_path, step_name(4), latest=step_name(4))
        return remove(path)

    monkeypatch.setattr(protocol, "remove", removed)
    prune(tmp_path, 1, abandoned=False)
    assert kept(tmp_path) == [step_name(3), step_name(4)]
    assert find_checkpoint(tmp_path) == tmp_path / step_name(4)
