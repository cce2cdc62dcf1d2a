"""The extra layers of a run with objective.name mtp in an export: `mtp/`.

At position t, head(norm_i(layer_i(h))) predicts x_{t+1+i} for i = 1 .. horizon. A layer is a decoder layer of the base
(`../config.json` has its sizes) over the base's final-normed states h, the head is the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.huggingface.drafters.format import DrafterKind, StoredDrafter, Tensors, load_drafter, save_drafter

MTP_DIRECTORY = "mtp"
MTP_TENSORS = (  # of `layers.0`, `layers.1`, …; all but the last as `LlamaForCausalLM` names them
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "norm.weight",  # between the layer and the base's output head
)


@dataclass(frozen=True)
class MTPConfig:
    """The keys of `mtp/config.json`."""

    hidden_size: int
    vocab_size: int
    horizon: int
    base_weights_sha256: str


def _tensor_names(config: MTPConfig) -> Sequence[str]:
    return [f"layers.{index}.{name}" for index in range(config.horizon) for name in MTP_TENSORS]


def _shapes(config: MTPConfig, base: LlamaConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(config.horizon):
        shapes |= dict(base.layer_shapes(f"layers.{index}."))
        shapes[f"layers.{index}.norm.weight"] = (base.hidden_size,)
    return shapes


MTP = DrafterKind(
    name=MTP_DIRECTORY,
    algorithm="mtp",
    architecture="MultiTokenPrediction",
    config=MTPConfig,
    tensor_names=_tensor_names,
    from_checkpoint="nextlat_dist.huggingface.checkpoint_drafters:mtp_of_checkpoint",
    drafter="nextlat_dist.inference.drafters.mtp:build",
    speculative_tokens=lambda config: config.horizon,
    shapes=_shapes,
)


def save_mtp(export: Path, config: MTPConfig, weights: Tensors) -> None:
    """Write `export/mtp`; `weights` holds exactly `MTP_TENSORS` of each of the layers."""
    save_drafter(export, MTP, config, weights)


def load_mtp(export: Path, base_sha256: str) -> StoredDrafter | None:
    """The extra layers next to the base weights in `export`, see `load_drafter`."""
    return load_drafter(export, MTP, base_sha256)
