"""Canonical weights <-> Hugging Face Llama: names, the fused matrices taken apart, the vocabulary padding cut off.

The mapping is linear and exact (a permutation of rows), so it carries gradients as well as weights.
"""

from __future__ import annotations

from typing import Any

import torch

from nextlat_dist.config.entries import resolve
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.forms.catalogue import FORMS
from nextlat_dist.huggingface.forms.layers import layer_parts

PREDICTOR_PREFIX = "latent_predictor."
MTP_PREFIX = "mtp."


def to_llama(
    canonical: dict[str, torch.Tensor], config: RunConfig, eos_token_id: int | None = None
) -> dict[str, torch.Tensor]:
    """{canonical name: full tensor} -> {`LlamaForCausalLM` name: tensor}, with what the base's form has besides; what
    only drafts or trains is left out. `eos_token_id`: of the run's tokenizer.
    """
    model, form = config.model, FORMS[config.objective.entry.model_type]
    llama: dict[str, torch.Tensor] = {}
    for name, tensor in canonical.items():
        if name == "embedding.word_embeddings.weight":
            llama["model.embed_tokens.weight"] = tensor[: model.vocab_size]
        elif name == "output_layer.weight":
            llama["lm_head.weight"] = tensor[: model.vocab_size]
        elif name == "decoder.final_layernorm.weight":
            llama["model.norm.weight"] = tensor
        elif name.startswith("decoder.layers."):
            _, _, index, part = name.split(".", 3)
            for suffix, piece in layer_parts(part, tensor, config).items():
                llama[f"model.layers.{index}.{suffix}.weight"] = piece
        elif name.partition(".")[0] in form.parts:
            llama[name] = tensor
        elif name.partition(".")[0] not in config.objective.entry.parts:
            raise UserError(
                f"the checkpoint's parameter {name} has no place in a Llama, and the entry of objective.name "
                f"{config.objective.name} does not list {name.partition('.')[0]!r} among its `parts`"
            )
    if form.finish is not None:
        llama |= resolve(form.finish)(canonical, config, eos_token_id)
    return {name: tensor.contiguous() for name, tensor in llama.items()}


def predictor_tensors(canonical: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The latent predictor's tensors, without their prefix; empty for a model trained without one."""
    return {n.removeprefix(PREDICTOR_PREFIX): t for n, t in canonical.items() if n.startswith(PREDICTOR_PREFIX)}


def mtp_tensors(canonical: dict[str, torch.Tensor], config: RunConfig) -> dict[str, torch.Tensor]:
    """The extra layers of multi-token prediction under a Llama's names (`layers.0.self_attn.q_proj.weight`), each one's
    last norm as `layers.0.norm.weight`; empty for a model trained without them.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in canonical.items():
        if name.startswith(MTP_PREFIX):
            _, _, index, part = name.split(".", 3)
            pieces = {"norm": tensor} if part == "final_layernorm.weight" else layer_parts(part, tensor, config)
            found |= {f"layers.{index}.{suffix}.weight": piece.contiguous() for suffix, piece in pieces.items()}
    return found


def llama_config(config: RunConfig, dtype: torch.dtype, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """`config.json`; `special_ids` holds bos_token_id, eos_token_id and pad_token_id."""
    model = config.model
    return {
        **FORMS[config.objective.entry.model_type].to_json(config),
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": model.init_method_std,
        "dtype": str(dtype).removeprefix("torch."),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **special_ids,
    }
