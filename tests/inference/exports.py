"""Tiny exports for the tests of inference and evaluation: random weights, or weights whose predictor is right."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nextlat_dist.export.layout import PredictorConfig, save_base_weights, save_predictor

BOS, EOS = 1, 2


def tiny_config(**changes: object) -> LlamaConfig:
    fields: dict[str, object] = {
        "vocab_size": 31,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**fields, **changes})


def random_weights(config: LlamaConfig, seed: int = 0, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Weights far enough from zero that attention and logits are not nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if tensor.dim() == 1 else scale * noise
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def random_predictor(hidden: int, seed: int = 1, width: int = 24, scale: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer_norm.weight": torch.ones(2 * hidden),
        "layer_norm.bias": 0.1 * torch.randn(2 * hidden, generator=generator),
        "linear_in.weight": scale * torch.randn(width, 2 * hidden, generator=generator),
        "linear_mid.weight": scale * torch.randn(width, width, generator=generator),
        "linear_out.weight": scale * torch.randn(hidden, width, generator=generator),
    }


def write_export(
    directory: Path,
    config: LlamaConfig,
    weights: dict[str, torch.Tensor],
    predictor: dict[str, torch.Tensor] | None,
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    eos_and_bos = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (directory / "generation_config.json").write_text(json.dumps(eos_and_bos))
    digest = save_base_weights(directory, weights)
    if predictor is not None:
        width = predictor["linear_mid.weight"].shape[0]
        fields = PredictorConfig(config.hidden_size, width, config.vocab_size, 2, 1e-5, digest)
        save_predictor(directory, fields, predictor)
    return directory
