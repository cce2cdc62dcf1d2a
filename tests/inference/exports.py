"""Tiny exports for the tests of inference and evaluation: random weights, or weights whose predictor is right."""

from __future__ import annotations

import io
import json
import random
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from nextlat_dist.export.layout import PredictorConfig, save_base_weights, save_predictor
from nextlat_dist.export.tokenizer import export_tokenizer

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


def copying_model(config: LlamaConfig, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base weights whose h_t is the embedding of x_t alone, and the predictor that is then right about every state.

    The layers add nothing, and the embeddings have mean 0 and mean square 1, so both norms leave them as they are. The
    predictor has to compute e(x) - h, and gelu(z) - gelu(-z) = z carries that through its two activations.
    """
    hidden = config.hidden_size
    weights = random_weights(config, seed, scale=1.0)
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
    embedding = weights["model.embed_tokens.weight"]
    embedding -= embedding.mean(dim=1, keepdim=True)
    embedding /= embedding.square().mean(dim=1, keepdim=True).sqrt()
    one = torch.eye(hidden)
    difference = torch.cat([-one, one], dim=1)  # [h, e] → e - h
    halves = torch.cat([one, -one], dim=1)
    predictor = {
        "layer_norm.weight": torch.ones(2 * hidden),
        "layer_norm.bias": torch.zeros(2 * hidden),
        "linear_in.weight": torch.cat([difference, -difference]),
        "linear_mid.weight": torch.cat([halves, -halves]),
        "linear_out.weight": halves.clone(),
    }
    return weights, predictor


def reference_model(directory: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """transformers' own model of an export; its norms compute in `dtype` (they would fall back to fp32 in float64)."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(
                functional.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    return model


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


def write_tokenizer(directory: Path) -> int:
    """Tokenizer files of a sentencepiece model with byte fallback, as an export has them; returns the size."""
    words = ["alpha", "beta", "gamma", "delta", "return", "self", "import", "value"]
    pick = random.Random(0)
    lines = [" ".join(pick.choices(words, k=8)) for _ in range(200)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = directory / "tokenizer.source.model"
    path.write_bytes(model.getvalue())
    export_tokenizer(path, directory, 128)
    size: int = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    return size
