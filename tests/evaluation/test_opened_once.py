"""Every evaluation opens each export once: its files of weights are opened as often as opening the export takes.

Counted by the kernel (inotify), whatever the code path.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_tools.tasks import TaskOptions, write_task
from nextlat_dist.cli import main
from nextlat_dist.evaluation.belief import predictor as belief_predictor
from nextlat_dist.evaluation.belief import probes as belief_probes
from nextlat_dist.huggingface.opened import open_export
from nextlat_dist.tasks import vocab_size
from nextlat_dist.tasks.city import City
from nextlat_dist.tasks.hmm import Hmm
from nextlat_dist.tasks.path_star import PathStar
from nextlat_dist.tasks.state_tracking import StateTracking
from tests.kit.exports import random_predictor, random_weights, tiny_config, write_export
from tests.kit.task_exports import write_test_set

IN_OPEN, IN_NONBLOCK = 0x20, 0x800
EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name

STAR = PathStar(arms=2, length=3, nodes=20)
TASKS = {"star": STAR, "group": StateTracking(length=4, group="S3", test_length=(8,)), "city": City(rows=3, columns=3)}


@contextmanager
def opens(*folders: Path) -> Iterator[Counter[str]]:
    """How often each file of the folders is opened within the block, by `folder/name`."""
    libc = ctypes.CDLL(None, use_errno=True)
    queue = libc.inotify_init1(IN_NONBLOCK)
    assert queue >= 0, os.strerror(ctypes.get_errno())
    counted: Counter[str] = Counter()
    watched = {libc.inotify_add_watch(queue, os.fsencode(folder), IN_OPEN): folder for folder in folders}
    assert min(watched) > 0
    try:
        yield counted
        while True:
            try:
                events = os.read(queue, 1 << 16)
            except BlockingIOError:
                break
            while events:
                watch, _, _, length = EVENT.unpack_from(events)
                name = events[EVENT.size : EVENT.size + length].rstrip(b"\0").decode()
                counted[f"{watched[watch].name}/{name}"] += 1
                events = events[EVENT.size + length :]
    finally:
        os.close(queue)


def weights_opened(export: Path, action: Callable[[], object]) -> dict[str, int]:
    """By file of weights of the base and the drafter."""
    with opens(export, export / "latent_predictor") as counted:
        action()
    return {name: count for name, count in counted.items() if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=600, max_position_embeddings=16)
    directory = tmp_path_factory.mktemp("once") / "export"
    return write_export(directory, config, random_weights(config), random_predictor(config.hidden_size))


def opened(export: Path) -> dict[str, int]:
    """What opening once takes."""

    def read() -> None:
        found = open_export(export)
        assert found.weights
        assert found.drafter is not None

    return weights_opened(export, read)


def evaluate(*arguments: str) -> None:
    assert main(["evaluate", *arguments]) == 0


def test_opening_twice_is_seen(export: Path) -> None:
    once = opened(export)
    assert once.keys() == {"export/model.safetensors", "latent_predictor/model.safetensors"}
    twice = weights_opened(export, lambda: [open_export(export).drafter for _ in range(2)])
    assert twice == {name: 2 * count for name, count in once.items()}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_opens_its_export_once(name: str, export: Path, tmp_path: Path) -> None:
    assert vocab_size(TASKS[name]) <= 600
    data = write_test_set(tmp_path / "test", TASKS[name], 6)
    assert weights_opened(export, lambda: evaluate("task", "--export", str(export), "--data", str(data))) == opened(
        export
    )


def test_belief_opens_its_export_once(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(belief_predictor, "STEPS", 2)
    monkeypatch.setattr(belief_probes, "MLP_STEPS", 2)
    write_task(Hmm(process="mess3", length=8), TaskOptions(tmp_path / "data", train=24, test=24))
    found = weights_opened(
        export, lambda: evaluate("belief", "--export", str(export), "--data", str(tmp_path / "data" / "test"))
    )
    assert found == opened(export)


def test_probes_open_their_export_once(export: Path, text_dataset: Path) -> None:
    arguments = ["--offsets", "1", "--sequences", "8", "--length", "12", "--steps", "2"]
    found = weights_opened(
        export, lambda: evaluate("probes", "--export", str(export), "--data", str(text_dataset / "train"), *arguments)
    )
    assert found == opened(export)
