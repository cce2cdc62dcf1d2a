"""The export on disk: a plain Llama directory, and what drafts for it in a directory of its own.

    export/                     config.json, generation_config.json, model.safetensors, model.safetensors.index.json,
                                tokenizer files
    export/latent_predictor/    config.json, model.safetensors; draft_vocabulary.safetensors, if it drafts from fewer
                                ids than the base has; calibration.json, once it is calibrated
    export/mtp/                 config.json, model.safetensors: of a run with objective.name mtp, in its place

Loaders that glob `*.safetensors` in the root never see the predictor. The predictor names the base weights it was
trained with by content hash, so that it is refused beside any other base. Needs torch and safetensors only.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import load_file, save_file

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import WEIGHTS_FILE

PREDICTOR_DIRECTORY = "latent_predictor"
MTP_DIRECTORY = "mtp"
DRAFT_VOCABULARY_FILE = "draft_vocabulary.safetensors"
DRAFT_VOCABULARY_TENSOR = "draft_vocabulary"  # int64 [draft vocabulary], ascending
CALIBRATION_FILE = "calibration.json"
FORMAT_VERSION = 1  # of both directories
PREDICTOR_TENSORS = (
    "layer_norm.weight",  # [2 * hidden_size]
    "layer_norm.bias",  # [2 * hidden_size]
    "linear_in.weight",  # [predictor_hidden_size, 2 * hidden_size]
    "linear_mid.weight",  # [predictor_hidden_size, predictor_hidden_size]
    "linear_out.weight",  # [hidden_size, predictor_hidden_size]
)
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
class PredictorConfig:
    """`latent_predictor/config.json`: h + linear_out(gelu(linear_mid(gelu(linear_in(layer_norm([h, e(x)])))))), exact
    GELU.
    """

    hidden_size: int
    predictor_hidden_size: int
    vocab_size: int
    horizon: int
    layer_norm_epsilon: float
    base_weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        return {**_speculator("LatentPredictor", "nextlat", None), "activation": "gelu", **asdict(self)}


@dataclass(frozen=True)
class MTPConfig:
    """`mtp/config.json`: at position t, head(norm_i(layer_i(h))) predicts x_{t+1+i} for i = 1 .. horizon.

    A layer is a decoder layer of the base (`../config.json` has its sizes) over the base's final-normed states h, the
    head is the base's.
    """

    hidden_size: int
    vocab_size: int
    horizon: int
    base_weights_sha256: str

    def to_json(self) -> dict[str, Any]:
        return {**_speculator("MultiTokenPrediction", "mtp", self.horizon), **asdict(self)}


def _speculator(architecture: str, algorithm: str, speculative_tokens: int | None) -> dict[str, Any]:
    """What speculators' configurations have in common; `speculative_tokens` None: any number."""
    return {
        "format_version": FORMAT_VERSION,
        "architectures": [architecture],
        "speculators_model_type": algorithm,
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [{"proposal_type": "sample", "speculative_tokens": speculative_tokens}],
            "verifier": {"name_or_path": "..", "architectures": ["LlamaForCausalLM"]},
        },
    }


Config = TypeVar("Config", PredictorConfig, MTPConfig)


class StoredPredictor(NamedTuple):
    """What `latent_predictor/` holds; `draft_vocabulary` is int64, ascending, or None: it drafts from all ids."""

    config: PredictorConfig
    weights: dict[str, torch.Tensor]
    draft_vocabulary: torch.Tensor | None


def save_predictor(directory: Path, config: PredictorConfig, weights: dict[str, torch.Tensor]) -> None:
    """Write `directory/latent_predictor`; `weights` holds exactly `PREDICTOR_TENSORS`."""
    assert sorted(weights) == sorted(PREDICTOR_TENSORS), sorted(weights)
    _save(directory / PREDICTOR_DIRECTORY, config, weights)


def save_mtp(directory: Path, config: MTPConfig, weights: dict[str, torch.Tensor]) -> None:
    """Write `directory/mtp`; `weights` holds exactly `MTP_TENSORS` of each of the layers."""
    expected = [f"layers.{index}.{name}" for index in range(config.horizon) for name in MTP_TENSORS]
    assert sorted(weights) == sorted(expected), sorted(weights)
    _save(directory / MTP_DIRECTORY, config, weights)


def _save(target: Path, config: PredictorConfig | MTPConfig, weights: dict[str, torch.Tensor]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in weights.items()}, target / WEIGHTS_FILE, {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")


def load_predictor(directory: Path, base_sha256: str) -> StoredPredictor | None:
    """The latent predictor beside the base weights in `directory`; None if the export has none.

    Raises:
        UserError: it was trained with other base weights than `base_sha256`, its format is unknown, or its draft
            vocabulary is damaged.
    """
    target = directory / PREDICTOR_DIRECTORY
    if not target.is_dir():
        return None
    config, weights = _load(target, PredictorConfig, base_sha256)
    return StoredPredictor(config, weights, _load_draft_vocabulary(target, config.vocab_size))


def load_mtp(directory: Path, base_sha256: str) -> tuple[MTPConfig, dict[str, torch.Tensor]] | None:
    """The extra layers beside the base weights in `directory`; None if the export has none.

    Raises:
        UserError: they were trained with other base weights than `base_sha256`, or their format is unknown.
    """
    target = directory / MTP_DIRECTORY
    return _load(target, MTPConfig, base_sha256) if target.is_dir() else None


def _load(target: Path, kind: type[Config], base_sha256: str) -> tuple[Config, dict[str, torch.Tensor]]:
    raw = json.loads((target / "config.json").read_text())
    if raw.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{target} has format_version {raw.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "export the checkpoint again"
        )
    config = kind(**{name: raw[name] for name in kind.__dataclass_fields__})
    if config.base_weights_sha256 != base_sha256:
        raise UserError(
            f"{target} belongs to base weights {config.base_weights_sha256[:12]}…, but {target.parent} holds "
            f"{base_sha256[:12]}…; export base and predictor together again"
        )
    return config, load_file(target / WEIGHTS_FILE)


def save_draft_vocabulary(directory: Path, ids: torch.Tensor | None) -> None:
    """Give the predictor of the export in `directory` these ids to draft from (int64, ascending); None: all of them.

    A calibration measured with other ids is removed.
    """
    target = directory / PREDICTOR_DIRECTORY
    (target / CALIBRATION_FILE).unlink(missing_ok=True)
    if ids is None:
        (target / DRAFT_VOCABULARY_FILE).unlink(missing_ok=True)
        return
    temporary = target / f"{DRAFT_VOCABULARY_FILE}.tmp"
    save_file({DRAFT_VOCABULARY_TENSOR: ids.contiguous()}, temporary, {"format": "pt"})
    os.replace(temporary, target / DRAFT_VOCABULARY_FILE)


def _load_draft_vocabulary(target: Path, vocab_size: int) -> torch.Tensor | None:
    path = target / DRAFT_VOCABULARY_FILE
    if not path.is_file():
        return None
    ids = load_file(path).get(DRAFT_VOCABULARY_TENSOR)
    if (
        ids is None
        or ids.dtype != torch.int64
        or ids.dim() != 1
        or not 0 < ids.numel() < vocab_size
        or not 0 <= int(ids[0]) <= int(ids[-1]) < vocab_size
        or not bool((ids.diff() > 0).all())
    ):
        raise UserError(
            f"{path} is not an ascending list of some of the {vocab_size} token ids; write it again with "
            "`nextlat calibrate --draft-vocabulary`"
        )
    return ids
