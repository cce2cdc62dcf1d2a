"""One decoder layer: Megatron-Core's `TransformerLayer` by spec, with our attention core and rotary table.

With sequence parallelism the residual stream is [s / tensor size, b, h] on every tensor rank, in rank order; the
layer's own matrices gather and scatter it. Norms then see a part of the sequence (`Sharding.partial`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from nextlat_dist.config.schema import ModelConfig
from nextlat_dist.model.attention import DocumentAttention, RecomputedAttention, Seen, visible
from nextlat_dist.model.gated_mlp import GatedMLP, RecomputedMLP
from nextlat_dist.model.rotary import Rotation, rotary_angles
from nextlat_dist.model.rows import Batch, ObjectiveInputs

Recompute = Literal["none", "selective", "full"]


def transformer_config(
    model: ModelConfig, tensor_size: int, dtype: torch.dtype, *, sequence_parallel: bool = False
) -> Any:
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
        sequence_parallel=sequence_parallel,
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


def layer_spec(recompute: Recompute) -> Any:
    """The local (no Transformer Engine) GPT layer spec with `DocumentAttention` as its core and norms of our own:
    Megatron-Core's refuse sequence parallelism.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = LayerNorm
    core = RecomputedAttention if recompute == "selective" else DocumentAttention
    parts.self_attention.submodules.core_attention = core
    return spec


def set_documents(module: nn.Module, documents: int | None) -> None:
    """Tell the decoder layers in `module` how many documents the batches to come have at most."""
    for part in module.modules():
        if isinstance(part, DecoderLayer):
            part.documents = documents


class LayerNorm(nn.RMSNorm):
    """torch's, as Megatron-Core builds a norm."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class DecoderLayer(nn.Module):
    """(hidden [s, b, h], message) -> (hidden [s, b, h], message); see `rows`."""

    def __init__(
        self,
        transformer_config: Any,
        layer_index: int,
        sequence_length: int,
        rotary_base: float,
        process_groups: Any,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        from megatron.core.transformer.transformer_layer import TransformerLayer

        self.canonical_prefix = f"decoder.layers.{layer_index}"
        self.recompute = recompute
        self.documents: int | None = None  # see `attention.visible`; set for every step
        # Not a buffer: DeepSpeed would cast it to bf16 together with the weights.
        self._angles = rotary_angles(
            sequence_length, transformer_config.kv_channels, rotary_base, transformer_config.params_dtype
        )
        self._rotation: Rotation | None = None  # in the precision and on the device of the hidden states
        self.layer = TransformerLayer(
            transformer_config,
            layer_spec(recompute).submodules,
            layer_number=layer_index + 1,
            pg_collection=process_groups,
        )
        self.layer.mlp = (RecomputedMLP if recompute == "selective" else GatedMLP)(self.layer.mlp)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, message = inputs
        if self.recompute == "full" and torch.is_grad_enabled():
            hidden = checkpoint(self._run, hidden, message, use_reentrant=False)
        else:
            hidden = self._run(hidden, message)
        return hidden, message

    def _run(self, hidden: torch.Tensor, message: torch.Tensor) -> torch.Tensor:
        known = self._rotation
        if known is None or known.cos.dtype != hidden.dtype or known.cos.device != hidden.device:
            known = self._rotation = Rotation.of(self._angles, hidden.dtype).to(hidden.device)
        # Megatron-Core hands this to its core attention as it is, and rotates nothing itself.
        seen = Seen(visible(message, self.documents), known.first(Batch(message).inputs.shape[1]))
        output: torch.Tensor = self.layer(hidden, attention_mask=seen)[0]
        return output


class FinalNorm(nn.RMSNorm):
    """The norm whose output is h_t, the vector the output head reads: (hidden, message) -> ObjectiveInputs.

    With sequence parallelism it ends here: an objective sees the whole sequence, and hands back a whole gradient of it.
    """

    canonical_prefix = "decoder.final_layernorm"

    def __init__(self, gathered_over: dist.ProcessGroup | None = None, **norm: Any) -> None:
        """`gathered_over`: the ranks that have a part of the sequence each."""
        super().__init__(**norm)
        self.gathered_over = gathered_over

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> ObjectiveInputs:  # type: ignore[override]
        hidden, message = inputs
        return ObjectiveInputs(gather_sequence(super().forward(hidden), self.gathered_over), message)


class TrunkEnd(nn.Module):
    """Instead of `FinalNorm` where the objective has the norm: (hidden, message) -> ObjectiveInputs."""

    def __init__(self, gathered_over: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self._gathered_over = gathered_over

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> ObjectiveInputs:
        hidden, message = inputs
        return ObjectiveInputs(gather_sequence(hidden, self._gathered_over), message)


def gather_sequence(part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[s / ranks, b, h] of every rank -> [s, b, h]; the gradient must be whole on every rank. None: as it is."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    if group is None:
        return part
    whole: torch.Tensor = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=False, group=group)
    return whole


def scatter_sequence(whole: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """[s, b, h], the same on every rank -> this rank's [s / ranks, b, h]. None: as it is."""
    from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region

    if group is None:
        return whole
    part: torch.Tensor = scatter_to_sequence_parallel_region(whole, group=group)
    return part
