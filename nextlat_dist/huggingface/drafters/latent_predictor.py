"""The latent predictor of a NextLat run in an export: `latent_predictor/`.

h + linear_out(gelu(linear_mid(gelu(linear_in(layer_norm([h, e(x)])))))), exact GELU, with the base's own embedding e.
That is the paper's form; another `fusion` names an entry of the predictors, which says how to advance with its tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nextlat_dist.huggingface.base import LlamaConfig
from nextlat_dist.huggingface.drafters.format import (
    DrafterKind,
    StoredDrafter,
    Tensors,
    load_drafter,
    save_drafter,
    write_draft_vocabulary,
)

PREDICTOR_DIRECTORY = "latent_predictor"
PREDICTOR_TENSORS = (
    "layer_norm.weight",  # [2 * hidden_size]
    "layer_norm.bias",  # [2 * hidden_size]
    "linear_in.weight",  # [predictor_hidden_size, 2 * hidden_size]
    "linear_mid.weight",  # [predictor_hidden_size, predictor_hidden_size]
    "linear_out.weight",  # [hidden_size, predictor_hidden_size]
)


@dataclass(frozen=True)
class LatentPredictorConfig:
    """The keys of `latent_predictor/config.json`."""

    hidden_size: int
    predictor_hidden_size: int
    vocab_size: int
    horizon: int
    layer_norm_epsilon: float
    base_weights_sha256: str
    fusion: str = "concat"  # the form of the predictor, `predictor.fusion` of its run; the default is the paper's


def _shapes(config: LatentPredictorConfig, base: LlamaConfig) -> dict[str, tuple[int, ...]]:
    if config.fusion != LatentPredictorConfig.fusion:
        return {}  # its entry alone knows
    hidden, width = base.hidden_size, config.predictor_hidden_size
    shapes = ((2 * hidden,), (2 * hidden,), (width, 2 * hidden), (width, width), (hidden, width))
    return dict(zip(PREDICTOR_TENSORS, shapes, strict=True))


LATENT_PREDICTOR = DrafterKind(
    name=PREDICTOR_DIRECTORY,
    algorithm="nextlat",
    architecture="LatentPredictor",
    config=LatentPredictorConfig,
    tensor_names=lambda config: PREDICTOR_TENSORS if config.fusion == LatentPredictorConfig.fusion else None,
    from_checkpoint="nextlat_dist.huggingface.checkpoint_drafters:predictor_of_checkpoint",
    drafter="nextlat_dist.inference.drafters.latent_predictor:build",
    constants={"activation": "gelu"},
    draft_vocabulary=True,
    shapes=_shapes,
)


def save_predictor(export: Path, config: LatentPredictorConfig, weights: Tensors) -> None:
    """Write `export/latent_predictor`; `weights` holds exactly `PREDICTOR_TENSORS`."""
    save_drafter(export, LATENT_PREDICTOR, config, weights)


def load_predictor(export: Path, base_sha256: str) -> StoredDrafter | None:
    """The latent predictor next to the base weights in `export`, see `load_drafter`."""
    return load_drafter(export, LATENT_PREDICTOR, base_sha256)


def save_draft_vocabulary(export: Path, ids: torch.Tensor | None) -> None:
    """Give the latent predictor of `export` these ids to draft from, see `write_draft_vocabulary`."""
    write_draft_vocabulary(export / PREDICTOR_DIRECTORY, ids)
