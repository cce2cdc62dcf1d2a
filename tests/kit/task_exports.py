"""Exports whose answers are known (the next token is a given function of the last one), and small sets of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch

from data_tools.shards.writer import DatasetWriter
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.tasks import BOS_ID, Document, Task, vocab_size
from tests.kit.datasets import FakeTokenizer
from tests.kit.exports import copying_model, tiny_config, write_export


def following_export(directory: Path, following: Mapping[int, int], **changes: object) -> Path:
    """Always writes `following[x]` after x; what it writes after other tokens is anything else. No two tokens are
    followed by the same one. Its latent predictor is right.
    """
    assert len(set(following.values())) == len(following)
    config = tiny_config(**changes)
    weights, predictor = copying_model(config)
    head = torch.zeros_like(weights["lm_head.weight"])
    for token, following_token in following.items():
        head[following_token] = weights["model.embed_tokens.weight"][token]
    weights["lm_head.weight"] = head
    return write_export(directory, config, weights, predictor)


def question(*tokens: int, answer: list[int]) -> Document:
    """BOS, the tokens that ask, the answer."""
    return Document(np.array([BOS_ID, *tokens, *answer]), 1 + len(tokens), b"")


def write_test_set(directory: Path, task: Task, count: int) -> Path:
    """`count` test documents of a task as a dataset."""
    tokenizer = cast(Tokenizer, FakeTokenizer(vocab_size=vocab_size(task)))
    sizes = {"record_tokens": 200, "shard_tokens": 10_000}
    writer = DatasetWriter(directory, "test", tokenizer, **sizes, has_prompts=True, bos=True, eos=True, overwrite=False)
    rng = np.random.default_rng(0)
    for _ in range(count):
        document = task.sample(rng, "test")
        extra = {} if document.labels is None else {"labels": document.labels.astype(np.uint16)}
        writer.add(document.tokens.astype(np.uint16), document.prompt_tokens, extra)
    writer.flush()
    writer.finish({"task": {"name": task.name, "parameters": task.parameters, "seed": 0}})
    return directory
