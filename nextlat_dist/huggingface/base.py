"""The base model of an export on disk: `config.json` of a plain Llama, its weights with their index, their hash.

export/    config.json, generation_config.json, model.safetensors, model.safetensors.index.json, tokenizer files
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nextlat_dist.errors import UserError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of `config.json` that the forward needs, named as there."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @staticmethod
    def from_directory(directory: Path) -> LlamaConfig:
        """Raises UserError: the model is no plain Llama, and which field says so."""
        raw: dict[str, Any] = json.loads((directory / CONFIG_FILE).read_text())
        rope = raw.get("rope_parameters") or {**raw, **(raw.get("rope_scaling") or {})}  # the older form is flat
        plain = {
            "model_type": (raw.get("model_type"), "llama"),
            "hidden_act": (raw.get("hidden_act"), "silu"),
            "attention_bias": (raw.get("attention_bias", False), False),
            "mlp_bias": (raw.get("mlp_bias", False), False),
            "rope_type": (rope.get("rope_type", "default"), "default"),
        }
        for field, (value, expected) in plain.items():
            if value != expected:
                raise UserError(
                    f"{directory / CONFIG_FILE} has {field} {value!r}, but this decoder runs {expected!r} only"
                )
        heads = raw["num_attention_heads"]
        return LlamaConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", 10000.0),
            max_position_embeddings=raw["max_position_embeddings"],
        )


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """Content hash of named tensors: independent of file layout and metadata."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Raises OSError where the system refuses; safetensors has its own error for that."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise OSError(str(error).rpartition("I/O error: ")[2]) from error


def save_base_weights(directory: Path, weights: dict[str, torch.Tensor]) -> str:
    """Write one safetensors file and its index; return the content hash.

    The index is written even for one file: some servers load every `*.safetensors` they find when it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(weights.items())}
    save_tensors(directory / WEIGHTS_FILE, weights)
    total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(weights, WEIGHTS_FILE)}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return weights_sha256(weights)


def load_base_weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every base tensor named by the index, on the CPU, in its stored dtype.

    Raises:
        UserError: the directory is no export.
    """
    check_is_export(directory)
    weight_map: dict[str, str] = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(directory / file, framework="pt") as opened:
            weights.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return weights


def check_is_export(directory: Path) -> None:
    """Raises UserError: the directory has no configuration or no base weights."""
    for name in (INDEX_FILE, CONFIG_FILE):
        if not (directory / name).is_file():
            raise UserError(f"{directory} is not an export: it has no {name}; write one with `nextlat export`")
