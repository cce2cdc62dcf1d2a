"""Saves during training, saves that fail, checkpoints that are damaged: what a run does about each."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from nextlat_dist.errors import UserError
from tests.kit import jobs
from tests.kit.harness import Ranks
from tests.kit.system import access_as_written, disk
from tests.kit.training.runs import logged, run_training, training_config


def config(output: Path, dataset: Path, **checkpoint: Any) -> dict[str, Any]:
    raw = training_config(output, dataset, {"zero_stage": 1}, {"validation_batches": 0})
    return {**raw, "checkpoint": {**raw["checkpoint"], **checkpoint}}


def refused(raw: dict[str, Any]) -> str:
    try:
        run_training(raw)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text_dataset: Path, two_ranks: Ranks) -> Path:
    """A run of six steps with checkpoints 3 and 6; not to be changed."""
    output = tmp_path_factory.mktemp("finished")
    two_ranks.run(run_training, config(output, text_dataset))
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def save_while_training(raw: dict[str, Any], root: Path) -> tuple[bool, list[bool]]:
    """Whether a save holds the state at its call although training went on before it was written, and whether the next
    save waited for it."""
    import torch

    from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, TensorReader
    from nextlat_dist.checkpoint.writer import Snapshot
    from nextlat_dist.training.engine.build import build_engine
    from nextlat_dist.training.engine.master_state import local_fragments
    from nextlat_dist.training.state.saving import Saver
    from nextlat_dist.training.state.trainer_state import TrainerState

    config, dims = jobs.set_up(raw)
    engine = build_engine(config, dims)
    jobs.train_steps(engine, config, dims, range(2))
    saver = Saver(config, dims, engine, root, None)
    may_write, original = threading.Event(), Snapshot.write
    waited: list[bool] = []

    def held(self: Snapshot, directory: Path) -> list[str]:
        waited.append(may_write.wait(60))
        return original(self, directory)

    Snapshot.write = held  # type: ignore[method-assign]
    try:
        before = {(f.name, key): v.clone() for f in local_fragments(engine) for key, v in f.values.items()}
        saver.save(TrainerState(step=2))
        jobs.train_steps(engine, config, dims, range(2, 4))
        assert saver.outcomes() == []
        threading.Timer(0.5, may_write.set).start()
        saver.save(TrainerState(step=4))  # waits for the one under way
        waited.append((root / "step_00000002" / "manifest.json").is_file())
        assert [outcome.error for outcome in saver.finish()] == ["", ""]
    finally:
        Snapshot.write = original  # type: ignore[method-assign]
        saver.close()
    with TensorReader(root / "step_00000002") as reader, TensorReader(root / "step_00000004") as later:
        same = all(
            torch.equal(reader.full(n, k).flatten(), before[n, k]) for n in reader.names for k in (WEIGHT, *MOMENTS)
        )
        moved = not torch.equal(later.full(reader.names[0]), reader.full(reader.names[0]))
    return same and moved, waited


def test_a_save_holds_the_state_at_its_call(tmp_path: Path, one_rank: Ranks) -> None:
    ((same, waited),) = one_rank.run(save_while_training, jobs.tiny_config(), tmp_path)
    assert same
    assert waited == [True, True, True]


def test_a_save_that_fails_costs_no_training(
    tmp_path: Path, text_dataset: Path, finished: Path, two_ranks: Ranks
) -> None:
    """A file where the save needs a directory, which no privilege overcomes."""
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step_00000003.writing").write_text("in the way")
    two_ranks.run(run_training, config(tmp_path, text_dataset))
    assert logged(tmp_path) == logged(finished)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    (event,) = [line["failed_save"] for line in lines if "failed_save" in line]
    assert event["step"] == 3
    assert "step_00000003 cannot be written (rank 0: " in event["error"]
    assert (checkpoints / "latest").read_text() == "step_00000006\n"


def test_a_last_save_that_fails_is_the_runs_end(run: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    (run / "checkpoints" / "step_00000006.writing").write_text("in the way")
    first, second = two_ranks.run(refused, config(run, text_dataset))
    assert first == second
    assert re.search(r"step_00000006 cannot be written .* make room or repair the access: older checkpoints", first)
    assert (run / "checkpoints" / "latest").read_text() == "step_00000003\n"


def kilobytes_of(directory: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4 for path in directory.rglob("*") if path.is_file())


def test_a_disk_that_is_full_keeps_the_older_checkpoint(
    finished: Path, tmp_path: Path, text_dataset: Path, two_ranks: Ranks
) -> None:
    """Room for one checkpoint and a half, for metrics and all; once there is more, later saves succeed."""
    one = kilobytes_of(finished / "checkpoints" / "step_00000003")
    run = tmp_path / "disk"
    with disk(run, one * 3 // 2) as remount:
        first, second = two_ranks.run(refused, config(run, text_dataset))
        assert first == second
        assert re.search(r"step_00000006 cannot be written \(rank \d: .*\); make room", first)
        assert (run / "checkpoints" / "latest").read_text() == "step_00000003\n"
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000003"]
        remount(f"size={3 * one}k")
        two_ranks.run(run_training, config(run, text_dataset))
        assert logged(run) == logged(finished)
        remount("ro")
        first, second = two_ranks.run(refused, config(run, text_dataset))
        assert first == second
        assert f"output_dir={run} cannot be written ([Errno 30] Read-only file system" in first
        assert len(list((run / "checkpoints").glob("step_*"))) == 2


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_start_that_cannot_write_is_a_sentence_of_all_ranks(
    name: str, run: Path, text_dataset: Path, two_ranks: Ranks
) -> None:
    """Only rank 0 writes these: the others must not wait for it."""
    other = run / {"config.yaml": "metrics.jsonl", "metrics.jsonl": "batch_hashes.jsonl"}[name]
    other.touch()
    before = other.read_bytes()
    (run / name).unlink()
    (run / name).mkdir()
    first, second = two_ranks.run(refused, config(run, text_dataset))
    assert first == second
    assert first.startswith(f"{run / name} cannot be written (Is a directory); make room there or repair the access")
    assert other.read_bytes() == before
    assert not list(run.glob(".*"))


def damage(run: Path, step: int = 6) -> Path:
    path = sorted((run / "checkpoints" / f"step_{step:08d}" / "optimizer").iterdir())[1]
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xaa\xbb\xcc")
    return path


def test_the_newest_whole_checkpoint_is_used(run: Path, finished: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    damage(run)
    two_ranks.run(run_training, config(run, text_dataset))
    assert logged(run) == logged(finished)
    steps = {json.loads(line)["step"] for line in (run / "metrics.jsonl").open()}
    assert steps == {1, 2, 3, 4, 5, 6}


def make_unreadable(checkpoint: Path, kind: str) -> None:
    """As the system refuses it to a user; "EIO" waits for `read_error`."""
    {
        "a file": checkpoint / "weights" / "tp0_pp0_dp1.safetensors",
        "the manifest": checkpoint / "manifest.json",
        "the folder": checkpoint,
        "the pointer": checkpoint.parent / "latest",
        "EIO": checkpoint.parent,
    }[kind].chmod(0o755 if kind == "EIO" else 0)


def find_unreadable(raws: dict[str, dict[str, Any]]) -> dict[str, tuple[str, list[str]]]:
    """What a resume would use of each run's checkpoints, or why it stops, and what it warns of."""
    from nextlat_dist.checkpoint import commit
    from nextlat_dist.training.state import resume

    answers, original = {}, commit.file_sha256
    warned: list[str] = []

    def read_error(path: Path) -> str:
        if "EIO" in path.parts and path.name == "trainer_state.json" and "step_00000006" in path.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path)

    note = lambda text, *words: warned.append(text % words)  # noqa: E731
    loggers = [(log, log.warning) for log in (commit.log, resume.log)]
    commit.file_sha256 = read_error
    for log, _ in loggers:
        log.warning = note  # type: ignore[method-assign, assignment]
    try:
        with access_as_written():
            for kind, raw in raws.items():
                config, dims = jobs.set_up(raw)
                try:
                    found = resume.find_resumable(config, dims, Path(raw["output_dir"]) / "checkpoints")
                    answers[kind] = str(found and found.name), list(warned)
                except UserError as error:
                    answers[kind] = str(error), list(warned)
                warned.clear()
    finally:
        commit.file_sha256 = original
        for log, warning in loggers:
            log.warning = warning  # type: ignore[method-assign]
    return answers


def test_a_checkpoint_that_cannot_be_read_is_named_and_the_one_before_is_used(
    finished: Path, tmp_path: Path, text_dataset: Path, two_ranks: Ranks
) -> None:
    """EACCES binds root's ranks here as it binds a user's; EIO is a disk that fails."""
    kinds = ["a file", "the manifest", "the folder", "the pointer", "EIO"]
    runs = {kind: shutil.copytree(finished, tmp_path / kind) for kind in kinds}
    for kind, run in runs.items():
        make_unreadable(run / "checkpoints" / "step_00000006", kind)
    raws = {kind: config(run, text_dataset) for kind, run in runs.items()}
    strict = {kind: config(run, text_dataset, fallback=False) for kind, run in runs.items()}
    found, others = two_ranks.run(find_unreadable, raws)
    refused, _ = two_ranks.run(find_unreadable, strict)
    checkpoints = {kind: run / "checkpoints" for kind, run in runs.items()}
    for run in runs.values():  # so that they can be removed
        (run / "checkpoints" / "step_00000006").chmod(0o755)
    files = {"a file": "weights/tp0_pp0_dp1.safetensors", "EIO": "trainer_state.json"}
    for kind in ("a file", "the manifest", "the folder", "EIO"):
        reason = "Input/output error" if kind == "EIO" else "Permission denied"
        path = checkpoints[kind] / "step_00000006" / files.get(kind, "manifest.json")
        sentence = f"{path} cannot be read ({reason}); choose another checkpoint"
        assert found[kind] == ("step_00000003", [f"{sentence}; resuming from step_00000003 instead"])
        assert others[kind] == ("step_00000003", [])  # one rank speaks
        assert refused[kind] == (sentence, [])
    pointer = checkpoints["the pointer"] / "latest"
    assert found["the pointer"][0] == "step_00000006"
    (warning,) = found["the pointer"][1]
    assert warning.startswith(f"{pointer} cannot be read (Permission denied); using the newest checkpoint in")


def test_checkpoints_that_cannot_be_listed_are_no_fresh_start(
    finished: Path, tmp_path: Path, text_dataset: Path, one_rank: Ranks
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints").chmod(0o311)
    ((answer, _),) = one_rank.run(find_unreadable, {"all": config(run, text_dataset)})[0].values()
    (run / "checkpoints").chmod(0o755)
    assert f"{run / 'checkpoints'} cannot be read (Permission denied)" in answer


def test_without_fallback_damage_stops_the_run(run: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    path = damage(run)
    first, second = two_ranks.run(refused, config(run, text_dataset, fallback=False))
    assert first == second
    assert f"{path.parent.name}/{path.name} does not match its sha256" in first


def test_nothing_whole_is_no_fresh_start(run: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    damage(run, 3)
    damage(run, 6)
    first, second = two_ranks.run(refused, config(run, text_dataset))
    assert first == second
    assert "step_00000003 is damaged" in first
    assert len(logged(run)) == 6, "no line of the run was touched"


def test_a_missing_rank_file_is_found(run: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    (run / "checkpoints" / "step_00000006" / "weights" / "tp0_pp0_dp1.safetensors").unlink()
    first, _ = two_ranks.run(refused, config(run, text_dataset, fallback=False))
    assert "half-written: weights/tp0_pp0_dp1.safetensors is missing" in first


class Malicious:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._target),)


def test_a_planted_pickle_is_never_opened(run: Path, tmp_path: Path, text_dataset: Path, two_ranks: Ranks) -> None:
    """Next to the files of a checkpoint, under the names that DeepSpeed would look for, and in place of one of them."""
    marker = tmp_path / "opened"
    planted = pickle.dumps(Malicious(marker))
    checkpoint = run / "checkpoints" / "step_00000006"
    for name in ("mp_rank_00_model_states.pt", "deepspeed/mp_rank_00_model_states.pt", "latest"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(planted)
    two_ranks.run(run_training, config(run, text_dataset))
    (checkpoint / "weights" / "tp0_pp0_dp0.safetensors").write_bytes(planted)
    first, _ = two_ranks.run(refused, config(run, text_dataset, fallback=False))
    assert "weights/tp0_pp0_dp0.safetensors has" in first
    assert not marker.exists()
    pickle.loads(planted)  # the control: it does what it is for
    assert marker.exists()
