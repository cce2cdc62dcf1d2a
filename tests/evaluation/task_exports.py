"""Exports whose answers are known: the next token is a given function of the last one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from tests.inference.exports import copying_model, tiny_config, write_export


def following_export(directory: Path, following: Mapping[int, int], **changes: object) -> Path:
    """Writes `following[x]` behind x, surely; what it does behind other tokens is anything else. No two tokens are
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
