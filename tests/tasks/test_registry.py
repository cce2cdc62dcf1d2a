from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from nextlat_dist.data.shard_format import Manifest, TokenizerEntry
from nextlat_dist.errors import UserError
from nextlat_dist.tasks import BOS_ID, FIRST_SYMBOL_ID, TASKS, make_task, task_of, vocab_size, words_of

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
    with pytest.raises(UserError, match=r"path-star cannot be made of \{'arms': 3\} .*'length'"):
        make_task("path-star", {"arms": 3})


def test_tasks_need_no_torch() -> None:
    modules = ", ".join(f"nextlat_dist.tasks.{module}" for module, _ in TASKS.values())
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
