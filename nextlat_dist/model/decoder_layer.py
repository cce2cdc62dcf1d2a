"""One decoder layer: Megatron-Core's `TransformerLayer` by spec, with our attention core and rotary table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nextlat_dist.config.schema import ModelConfig
from nextlat_dist.model.attention import DocumentMaskedAttention, document_attention_mask
from nextlat_dist.model.rows import Batch, ObjectiveInputs


def transformer_config(model: ModelConfig, tensor_size: int, dtype: torch.dtype) -> Any:
    """Megatron-Core's `TransformerConfig` for a Llama-family decoder.

    Weights are initialised by `model.initialize`, not by Megatron-Core: its sharded initialisation makes a gated
    `linear_fc1` a different function for every tensor-parallel size. The pipeline is DeepSpeed's, so Megatron sees one
    stage.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        ffn_hidden_size=model.ffn_size,
        tensor_model_parallel_size=tensor_size,
        pipeline_model_parallel_size=1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )


def layer_spec() -> Any:
    """The local (no Transformer Engine) GPT layer spec with `DocumentMaskedAttention` as its core."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = DocumentMaskedAttention
    return spec


def rotary_angles(sequence_length: int, head_size: int, base: float, dtype: torch.dtype) -> torch.Tensor:
    """[s, 1, 1, head size] angles, each frequency twice (rotate-half); fp32, or fp64 for an fp64 model."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inverse = 1.0 / base ** (torch.arange(0, head_size, 2, dtype=torch.int64).to(wide) / head_size)
    angles = torch.outer(torch.arange(sequence_length).to(wide), inverse)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class DecoderLayer(nn.Module):
    """(hidden [s, b, h], message) -> (hidden [s, b, h], message); see `rows`."""

    def __init__(
        self,
        transformer_config: Any,
        layer_index: int,
        sequence_length: int,
        rotary_base: float,
        process_groups: Any,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        from megatron.core.transformer.transformer_layer import TransformerLayer

        self.canonical_prefix = f"decoder.layers.{layer_index}"
        self.activation_checkpointing = activation_checkpointing
        # Not a buffer: DeepSpeed would cast it to bf16 together with the weights.
        self._angles = rotary_angles(
            sequence_length, transformer_config.kv_channels, rotary_base, transformer_config.params_dtype
        )
        self.layer = TransformerLayer(
            transformer_config, layer_spec().submodules, layer_number=layer_index + 1, pg_collection=process_groups
        )

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, message = inputs
        if self.activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(self._run, hidden, message, use_reentrant=False)
        else:
            hidden = self._run(hidden, message)
        return hidden, message

    def _run(self, hidden: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
        if self._angles.device != hidden.device:
            self._angles = self._angles.to(hidden.device)
        mask = document_attention_mask(Batch(message).input_documents)
        output: torch.Tensor = self.layer(hidden, attention_mask=mask, rotary_pos_emb=self._angles[: hidden.shape[0]])[
            0
        ]
        return output


class FinalNorm(nn.RMSNorm):
    """The norm whose output is h_t, the vector the output head reads: (hidden, message) -> ObjectiveInputs."""

    canonical_prefix = "decoder.final_layernorm"

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> ObjectiveInputs:  # type: ignore[override]
        hidden, message = inputs
        return ObjectiveInputs(super().forward(hidden), message)
