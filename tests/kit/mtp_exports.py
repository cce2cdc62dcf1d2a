"""A tiny export with the output heads of multi-token prediction."""

from __future__ import annotations

from pathlib import Path

import torch

from nextlat_dist.huggingface.base import weights_sha256
from nextlat_dist.huggingface.drafters.mtp import MTPConfig, save_mtp
from tests.kit.exports import random_weights, tiny_config, write_export

HORIZON, HIDDEN, CONTEXT = 2, 32, 48


VOCAB = 5  # so few that random drafts are accepted now and then


def mtp_export(directory: Path, horizon: int = HORIZON) -> Path:
    """A random base, whose extra layers are its own layers and final norm, drawn again."""
    config = tiny_config(vocab_size=VOCAB, eos_token_id=4, max_position_embeddings=CONTEXT)
    weights = random_weights(config)
    write_export(directory, config, weights, None)
    extra: dict[str, torch.Tensor] = {}
    for index in range(horizon):
        drawn = random_weights(config, seed=10 + index)
        named = {n.removeprefix("model.layers.0."): t for n, t in drawn.items() if n.startswith("model.layers.0.")}
        named["norm.weight"] = drawn["model.norm.weight"]
        extra |= {f"layers.{index}.{name}": tensor for name, tensor in named.items()}
    save_mtp(directory, MTPConfig(HIDDEN, VOCAB, horizon, weights_sha256(weights)), extra)
    return directory
