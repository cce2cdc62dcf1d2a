"""A server of plain models, as it finds one in the root of an export by the rules of vLLM's default loader.

It takes every `*.safetensors` of the root that the index names, builds the model of `architectures` from `config.json`
and fills it by name; `trust_remote_code` stays off.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM


def check_root(export: Path) -> None:
    """The root is one whole plain model: every tensor of it in the files that the index names, and nothing more."""
    index = json.loads((export / "model.safetensors.index.json").read_text())
    files = {path.name for path in export.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    assert not [path.name for pattern in ("*.bin", "*.pt", "consolidated*", "*.py") for path in export.glob(pattern)]
    assert not (export / "custom_generate").exists()
    stored = {}
    for file in files:
        with safe_open(export / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file
                stored[name] = opened.get_slice(name).get_shape()
    raw = json.loads((export / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "quantization_config", "speculators_config"} & set(raw)
    config = AutoConfig.from_pretrained(export)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    # A tied head is listed once, as the embedding.
    assert stored == {name: list(parameter.shape) for name, parameter in model.named_parameters()}
