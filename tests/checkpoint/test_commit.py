"""A checkpoint exists or it does not: crashes at every point of a commit, damage of every kind, what a path means."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.checkpoint import commit as protocol
from nextlat_dist.checkpoint.commit import (
    LATEST,
    MANIFEST,
    commit,
    find_checkpoint,
    manifest_digest,
    prune,
    read_manifest,
    step_name,
    verify,
    verify_together,
)
from nextlat_dist.errors import UserError
from tests.kit.harness import Ranks


def save(root: Path, *steps: int) -> None:
    """Commit a checkpoint of two files per rank at each step."""
    import torch.distributed as dist

    rank = dist.get_rank()
    for step in steps:

        def write(directory: Path, step: int = step) -> list[str]:
            (directory / "parts").mkdir(exist_ok=True)
            (directory / f"parts/rank{rank}.bin").write_bytes(bytes([rank]) * (1000 + step))
            (directory / f"rank{rank}.txt").write_text(f"step {step}")
            return [f"parts/rank{rank}.bin", f"rank{rank}.txt"]

        commit(root, step, {"topology": {"tensor": dist.get_world_size()}}, write)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Path:
    """A directory of the checkpoints 3 and 6, saved by two ranks; not to be changed."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    two_ranks.run(save, root, 3, 6)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(saved, copy)
    return copy


def refusal(action: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        action(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_commit_leaves(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [LATEST, step_name(3), step_name(6)]
    assert (saved / LATEST).read_text() == "step_00000006\n"
    manifest = verify(saved / step_name(6))
    files = {"parts/rank0.bin", "parts/rank1.bin", "rank0.txt", "rank1.txt"}
    assert set(manifest["files"]) == files  # every rank's, and nothing that is not there
    assert manifest["files"]["parts/rank1.bin"]["bytes"] == 1006
    assert (manifest["step"], manifest["topology"]) == (6, {"tensor": 2})


# What a path means.


def test_a_directory_means_its_latest_and_a_checkpoint_itself(saved: Path) -> None:
    assert find_checkpoint(saved) == saved / step_name(6)
    assert find_checkpoint(saved / step_name(3)) == saved / step_name(3)


def test_nothing_was_ever_saved(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none") is None
    assert find_checkpoint(tmp_path) is None
    (tmp_path / (step_name(1) + ".writing")).mkdir()
    assert find_checkpoint(tmp_path) is None
    (tmp_path / (step_name(1) + ".writing") / MANIFEST).write_text("{}")  # stopped just before its rename
    assert find_checkpoint(tmp_path) is None


def test_latest_names_nothing(root: Path) -> None:
    for text in ("step_00000009\n", "\n"):
        (root / LATEST).write_text(text)
        found = refusal(find_checkpoint, root)
        assert str(root / LATEST) in found
        assert repr(text.strip() or root.name) in found
        assert MANIFEST in found


def test_latest_names_a_half_written_checkpoint(root: Path) -> None:
    (root / step_name(6) / MANIFEST).unlink()
    assert "names 'step_00000006', which is not a committed checkpoint" in refusal(find_checkpoint, root)


def test_checkpoints_without_latest_are_no_fresh_start(root: Path) -> None:
    (root / LATEST).unlink()
    (root / (step_name(9) + ".writing")).mkdir()
    (root / (step_name(9) + ".writing") / MANIFEST).write_text("{}")
    assert find_checkpoint(root) == root / step_name(6)


def test_an_uncommitted_save_is_refused(root: Path) -> None:
    path = root / (step_name(9) + ".writing")
    shutil.copytree(root / step_name(6), path)
    assert "never committed" in refusal(find_checkpoint, path)


def test_a_half_written_checkpoint_is_refused_by_name_and_in_its_directory(root: Path) -> None:
    shutil.rmtree(root / step_name(3))
    (root / step_name(6) / MANIFEST).unlink()
    assert f"has no {MANIFEST}: it is half-written" in refusal(find_checkpoint, root / step_name(6))
    (root / LATEST).unlink()
    assert f"{step_name(6)} has no {MANIFEST}: it is half-written" in refusal(find_checkpoint, root)


# Damage.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: (path / "parts/rank1.bin").unlink(), r"half-written: parts/rank1\.bin is missing"),
    "truncated": (
        lambda path: os.truncate(path / "parts/rank1.bin", 1005),
        r"damaged: parts/rank1\.bin has 1005 bytes, its manifest says 1006",
    ),
    "longer": (
        lambda path: os.truncate(path / "parts/rank1.bin", 1007),
        r"damaged: parts/rank1\.bin has 1007 bytes, its manifest says 1006",
    ),
    "one bit": (lambda path: flip(path / "parts/rank1.bin"), r"damaged: parts/rank1\.bin does not match its sha256"),
    "first file": (lambda path: flip(path / "parts/rank0.bin"), r"damaged: parts/rank0\.bin does not match"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), r"manifest\.json cannot be read"),
    "manifest cut": (lambda path: os.truncate(path / MANIFEST, 100), r"manifest\.json cannot be read"),
    "manifest no mapping": (lambda path: (path / MANIFEST).write_text("[1]"), r"manifest\.json cannot be read"),
    "manifest binary": (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe"), r"manifest\.json cannot be read"),
    "other version": (
        lambda path: edit_manifest(path, lambda manifest: manifest.update(format_version=99)),
        r"has format_version 99, this release reads 2",
    ),
    "size edited": (
        lambda path: edit_manifest(path, lambda manifest: manifest["files"]["rank0.txt"].update(bytes=5)),
        r"manifest\.json was changed after it was written",
    ),
    "entry removed": (
        lambda path: edit_manifest(path, lambda manifest: manifest["files"].pop("rank0.txt")),
        r"manifest\.json was changed after it was written",
    ),
    "step edited": (
        lambda path: edit_manifest(path, lambda manifest: manifest.update(step=7)),
        r"manifest\.json was changed after it was written",
    ),
    "no digest": (
        lambda path: edit_manifest(path, lambda manifest: manifest.pop("digest")),
        r"manifest\.json was changed after it was written",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind: str, root: Path) -> None:
    damage, sentence = DAMAGE[kind]
    checkpoint = root / step_name(6)
    verify(checkpoint)
    damage(checkpoint)
    text = refusal(verify, checkpoint)
    assert re.search(sentence, text), text
    assert str(checkpoint) in text


def test_only_what_is_wanted_is_checked(root: Path) -> None:
    flip(root / step_name(6) / "parts/rank1.bin")
    verify(root / step_name(6), lambda name: "/" not in name)
    refusal(lambda path: verify(path, lambda name: name.startswith("parts/")), root / step_name(6))


def test_an_edited_manifest_with_a_new_digest_is_what_it_says(root: Path) -> None:
    """The digest guards against accidents; whoever computes it again means it."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["step"] = 7
        manifest["digest"] = manifest_digest(manifest)

    edit_manifest(root / step_name(6), change)
    assert read_manifest(root / step_name(6))["step"] == 7


def refused(checkpoints: list[Path]) -> list[str]:
    """What `verify_together` says of each checkpoint on this rank."""
    answers = []
    for checkpoint in checkpoints:
        try:
            verify_together(checkpoint)
            answers.append("")
        except UserError as error:
            answers.append(str(error))
    return answers


def test_damage_that_one_rank_finds_stops_all(saved: Path, tmp_path: Path, two_ranks: Ranks) -> None:
    files = ["parts/rank0.bin", "parts/rank1.bin", "rank0.txt", "rank1.txt", MANIFEST]
    damaged = []
    for number, file in enumerate(files):
        damaged.append(tmp_path / str(number))
        shutil.copytree(saved / step_name(6), damaged[-1])
        flip(damaged[-1] / file)
    first, second = two_ranks.run(refused, [saved / step_name(6), *damaged])
    assert first == second
    assert first[0] == ""
    for file, text in zip(files, first[1:], strict=True):
        assert file in text


# Crashes.


class Killed(BaseException):
    """Stands for a kill: nothing of the protocol catches it or cleans up."""


def killed_at(root: Path, point: int) -> str:
    """Save checkpoint 6 and be killed before its `point`-th durable operation; the operation's name, "" if it got
    through.
    """
    done = 0
    operations = [(os, "fsync"), (protocol, "write_durably"), (os, "rename"), (os, "replace")]
    originals = [(owner, name, getattr(owner, name)) for owner, name in operations]

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any) -> Any:
            nonlocal done
            if done == point:
                raise Killed(name)
            done += 1
            return original(*arguments)

        return operation

    try:
        for owner, name, original in originals:
            setattr(owner, name, guarded(name, original))
        save(root, 6)
    except Killed as killed:
        return str(killed)
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    return ""


def crash_everywhere(root: Path) -> list[tuple[str, list[str], str | None]]:
    """For every point of a commit: where it was killed, what is on disk, and the step that a resume would use.

    Each time the save is then done again over what was left, and must go through.
    """
    history = []
    while True:
        shutil.rmtree(root, ignore_errors=True)
        save(root, 3)
        operation = killed_at(root, len(history))
        left = sorted(path.name for path in root.iterdir())
        used = find_checkpoint(root)
        history.append((operation, left, used.name if used is not None else None))
        if used is not None:
            verify(used)
        save(root, 6)
        prune(root, 2)
        assert find_checkpoint(root) == root / step_name(6)
        assert sorted(path.name for path in root.iterdir()) == [LATEST, step_name(3), step_name(6)]
        verify(root / step_name(6))
        if not operation:
            return history


def test_killed_at_any_point_the_older_checkpoint_is_used(tmp_path: Path, one_rank: Ranks) -> None:
    history = one_rank.run(crash_everywhere, tmp_path / "checkpoints")[0]
    *crashes, (_, _, finished) = history
    assert finished == step_name(6)
    before = [used for operation, left, used in crashes if step_name(6) not in left]
    assert len(before) >= 4
    assert set(before) == {step_name(3)}
    # Renamed but not yet pointed at: still the older one; only the pointer decides.
    operations = [operation for operation, _, _ in crashes]
    assert {"rename", "replace"} <= set(operations)
    pointer = operations.index("replace")
    assert step_name(6) in crashes[pointer][1]
    assert [used for _, _, used in crashes[: pointer + 1]] == [step_name(3)] * (pointer + 1)
    assert [used for _, _, used in crashes[pointer + 1 :]] == [step_name(6)] * (len(crashes) - pointer - 1)


def first_save_killed(root: Path) -> list[str]:
    """What a resume would say after the very first save of a run was killed, for every point of it."""
    answers = []
    for point in range(100):
        shutil.rmtree(root, ignore_errors=True)
        operation = killed_at(root, point)
        try:
            used = find_checkpoint(root)
            answers.append(used.name if used is not None else "start from scratch")
        except UserError as error:
            answers.append(str(error))
        if not operation:
            break
    return answers


def test_first_save_killed(tmp_path: Path, one_rank: Ranks) -> None:
    """Nothing was committed: a fresh start. Renamed but without a pointer: used, never a silent start from scratch."""
    answers = one_rank.run(first_save_killed, tmp_path / "checkpoints")[0]
    kinds = ["scratch" if "scratch" in text else text for text in answers]
    assert kinds == sorted(kinds, key=["scratch", step_name(6)].index)
    assert kinds.count(step_name(6)) > 2


# A rank that cannot write.


def save_with_full_disk(root: Path, failing: int) -> str:
    """Save checkpoint 9 while the disk of one rank is full; what this rank is told."""
    import torch.distributed as dist

    def write(directory: Path) -> list[str]:
        (directory / f"rank{dist.get_rank()}.txt").write_text("begun")
        if dist.get_rank() == failing:
            raise OSError(28, "No space left on device")
        return [f"rank{dist.get_rank()}.txt"]

    try:
        commit(root, 9, {}, write)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_on_all(root: Path, failing: int, two_ranks: Ranks) -> None:
    first, second = two_ranks.run(save_with_full_disk, root, failing)
    assert first == second
    assert f"{step_name(9)} cannot be written (rank {failing}: [Errno 28] No space left on device)" in first
    assert "older checkpoints are as they were" in first
    assert sorted(path.name for path in root.iterdir()) == [LATEST, step_name(3), step_name(6)]
    assert find_checkpoint(root) == root / step_name(6)
    verify(root / step_name(6))
    two_ranks.run(save, root, 9)
    assert find_checkpoint(root) == root / step_name(9)
