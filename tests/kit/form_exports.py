"""Tiny exports whose base is more than a Llama: those of `objective: jtp` and `bst`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig

from nextlat_dist.huggingface.base import save_base_weights
from nextlat_dist.huggingface.drafters.format import save_drafter
from nextlat_dist.huggingface.drafters.jtp import JTP, JTPConfig
from nextlat_dist.huggingface.forms.catalogue import FORMS
from tests.kit.exports import random_weights, tiny_config


def _drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_fetch(hidden: int, heads: int, horizon: int, scale: float) -> dict[str, torch.Tensor]:
    return {
        "fetch.layer_norm.weight": 1 + 0.1 * _drawn(1, hidden),
        "fetch.layer_norm.bias": 0.1 * _drawn(2, hidden),
        "fetch.scale": torch.tensor([0.7]),
        "fetch.linear_qkv": scale * _drawn(3, 3 * hidden, hidden),
        "fetch.linear_proj": scale * _drawn(4, hidden, hidden),
        "fetch.relative_bias": _drawn(5, heads, horizon + 1, horizon + 1),
    }


def random_text_head(hidden: int, inner: int, scale: float) -> dict[str, torch.Tensor]:
    return {
        "text_head.linear_fc1": scale * _drawn(1, 2 * inner, 2 * hidden),
        "text_head.linear_fc2": scale * _drawn(2, 2 * hidden, inner),
        "text_head.layer_norm.weight": 1 + 0.1 * _drawn(3, 2 * hidden),
        "text_head.condition": _drawn(4, hidden),
    }


def jtp_export(directory: Path, horizon: int = 2, scale: float = 0.6, seed: int = 1, **changes: object) -> Path:
    """Random weights; `changes` of a Llama's configuration, as for `tiny_config`."""
    config = tiny_config(**changes)
    heads = min(4, config.num_attention_heads)
    weights = random_weights(config, seed, scale) | random_fetch(config.hidden_size, heads, horizon, scale)
    digest = _write(directory, config, "nextlat_jtp", {"horizon": horizon, "fetch_heads": heads}, weights)
    save_drafter(directory, JTP, JTPConfig(config.hidden_size, config.vocab_size, horizon, digest), {})
    return directory


def bst_export(directory: Path, inner: int = 24, scale: float = 0.6, seed: int = 1, **changes: object) -> Path:
    """The same of the other form."""
    config = tiny_config(**changes)
    weights = random_weights(config, seed, scale) | random_text_head(config.hidden_size, inner, scale)
    _write(directory, config, "nextlat_bst", {"text_head_size": inner}, weights)
    return directory


def _write(
    directory: Path, config: LlamaConfig, model_type: str, sizes: dict[str, int], weights: dict[str, torch.Tensor]
) -> str:
    """Configuration and weights; the weights' hash."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    path = directory / "config.json"
    own = {"model_type": model_type, "architectures": [FORMS[model_type].architecture], **sizes}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    eos_and_bos = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (directory / "generation_config.json").write_text(json.dumps(eos_and_bos))
    return save_base_weights(directory, weights)


def jtp_world(directory: Path, vocabulary: int) -> Path:
    """As `exports.tiny_world`: so few tokens that continuations can be enumerated."""
    return jtp_export(
        directory,
        horizon=3,
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=None,
    )
