from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.cli import main
from nextlat_dist.data.shard_format import Manifest, TokenizerEntry, read_manifest
from nextlat_dist.errors import UserError
from nextlat_dist.tasks import BOS_ID, FIRST_SYMBOL_ID, TASKS, make_task, task_names, task_of, vocab_size, words_of

PARAMETERS: dict[str, dict[str, Any]] = {
    "path-star": {"arms": 2, "length": 3, "nodes": 9},
    "countdown": {"inputs": 3},
    "state-tracking": {"group": "S3", "length": 5, "test_length": [7, 9]},
    "hmm": {"length": 8},
    "city": {"rows": 3, "columns": 3, "closed": 0.0},
}


def _manifest(report: dict[str, Any]) -> Manifest:
    return Manifest("test", TokenizerEntry("t", "5ha", 9, 1, 2, 3), (), True, True, True, report)


@pytest.mark.parametrize("name", TASKS)
def test_parameters_read_from_json_make_the_same_world(name: str) -> None:
    task = make_task(name, PARAMETERS[name])
    assert task.name == name
    again = make_task(name, json.loads(json.dumps(task.parameters)))
    assert again == task
    assert again.symbols == task.symbols
    assert vocab_size(task) == FIRST_SYMBOL_ID + len(set(task.symbols))
    for split in ("train", "test"):
        ours, theirs = (world.sample(np.random.default_rng(5), split) for world in (task, again))  # type: ignore[arg-type]
        assert (ours.tokens == theirs.tokens).all()
        assert ours.tokens.dtype == np.int64
        assert ours.tokens[0] == BOS_ID
        assert 1 <= ours.prompt_tokens < len(ours.tokens)
        assert ours.tokens.max() < vocab_size(task)
        assert " ".join(words_of(task, ours.tokens)).startswith("<s> ")


def test_the_task_of_a_dataset() -> None:
    task = make_task("path-star", PARAMETERS["path-star"])
    assert task_of(_manifest({"task": {"name": task.name, "parameters": task.parameters, "seed": 3}})) == task
    with pytest.raises(UserError, match=r"this dataset \(split test, 0 documents\) is not a task's"):
        task_of(_manifest({}))


def test_what_makes_no_task() -> None:
    with pytest.raises(UserError, match="there is no task 'star'; the tasks are path-star, countdown, state-tracking"):
        make_task("star", {})
    with pytest.raises(UserError, match="path-star has no parameter 'arm'; its parameters are arms, length, nodes"):
        make_task("path-star", {"arm": 3})
    with pytest.raises(UserError, match=r"^length is missing; the task path-star needs one$"):
        make_task("path-star", {"arms": 3})
    with pytest.raises(UserError, match=r"^arms is 'many', it must be a number$"):
        make_task("path-star", {"arms": "many", "length": 4})
    with pytest.raises(UserError, match=r"^test_length\[1\] is 2\.5, it must be of type int$"):
        make_task("state-tracking", {"length": 5, "group": "S3", "test_length": [8, 2.5]})


def test_tasks_need_no_torch() -> None:
    modules = ", ".join(reference.partition(":")[0] for reference in TASKS.values())
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_task_of_another_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn by its name, and a dataset of it knows its world again."""
    folder = tmp_path / "repeat_task-1.0.dist-info"
    folder.mkdir()
    (tmp_path / "repeat_task.py").write_text(
        "from dataclasses import dataclass\n"
        "from nextlat_dist.tasks import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, Document, id_array\n\n"
        "@dataclass(frozen=True)\n"
        "class Repeat:\n"
        '    """A word of digits, then the same word again."""\n'
        "    length: int\n"
        "    name = 'repeat'\n"
        "    symbols = tuple('0123456789')\n"
        "    parameters = property(lambda self: {'length': self.length})\n"
        "    def sample(self, rng, split):\n"
        "        word = rng.integers(10, size=self.length) + FIRST_SYMBOL_ID\n"
        "        return Document(id_array([BOS_ID], word, word, [EOS_ID]), 1 + self.length, word.tobytes())\n"
    )
    (folder / "METADATA").write_text("Name: repeat-task\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[nextlat_dist.tasks]\nrepeat = repeat_task:Repeat\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert task_names() == [*TASKS, "repeat"]
    sizes = ["--train", "8", "--test", "2", "--output", str(tmp_path / "data")]
    assert main(["task", "repeat", "--length", "6", *sizes]) == 0
    task = task_of(read_manifest(tmp_path / "data" / "test"))
    assert (task.name, task.parameters) == ("repeat", {"length": 6})
    with pytest.raises(UserError, match=r"the tasks are path-star, .*, city, repeat"):
        make_task("star", {})
