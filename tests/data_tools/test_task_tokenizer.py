from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.task_tokenizer import task_tokenizer
from nextlat_dist.huggingface.tokenizer import compare, export_tokenizer
from nextlat_dist.tasks import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, PAD_ID, Task, make_task, vocab_size, words_of

TASKS: list[Task] = [
    make_task("path-star", {"arms": 2, "length": 3, "nodes": 120}),
    make_task("state-tracking", {"group": "A5", "length": 5}),
    make_task("countdown", {}),
    make_task("hmm", {"length": 8}),
    make_task("city", {"rows": 12, "columns": 3}),
]
EVERY_TASK = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@EVERY_TASK
def test_every_word_is_one_token_with_the_tasks_id(task: Task) -> None:
    tokenizer = task_tokenizer(task)
    ids = np.random.default_rng(0).permutation(np.arange(FIRST_SYMBOL_ID, vocab_size(task)))
    text = " ".join(words_of(task, ids))
    assert tokenizer.vocab_size == vocab_size(task)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert tokenizer.encode(text) == ids.tolist()
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([BOS_ID, *ids, EOS_ID, PAD_ID]) == text
    assert task_tokenizer(task).model == tokenizer.model


@EVERY_TASK
def test_the_exported_tokenizer_says_the_same(task: Task, tmp_path: Path) -> None:
    tokenizer = task_tokenizer(task)
    (tmp_path / "source.model").write_bytes(tokenizer.model)
    export_tokenizer(tmp_path / "source.model", tmp_path, max_length=64)
    rng = np.random.default_rng(0)
    texts = [tokenizer.decode(task.sample(rng, "test").tokens) for _ in range(5)]
    found = compare(tokenizer, tmp_path, texts)
    assert found.pop("tokenizer_texts_compared") > len(texts)
    assert found == {"tokenizer_round_trip": True, "tokenizer_ids_identical": True}
