"""From an export directory to a decoder.

load(export: Path | str, device: str | None = None, dtype: torch.dtype | None = None) -> Decoder
"""

from __future__ import annotations

from pathlib import Path

import torch

from nextlat_dist.huggingface.base import LlamaConfig, load_base_weights, weights_sha256
from nextlat_dist.huggingface.drafters import MTP_DIRECTORY, PREDICTOR_DIRECTORY, load_mtp, load_predictor
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.base import Drafter
from nextlat_dist.inference.drafters.latent_predictor import LatentPredictor
from nextlat_dist.inference.drafters.mtp import MultiTokenPrediction
from nextlat_dist.inference.engine.graphs import Graphs, StaticLlama
from nextlat_dist.inference.engine.llama import Llama


def load(
    export: Path | str,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    cuda_graphs: bool = True,
) -> Decoder:
    """The decoder of an export directory.

    Args:
        export: a directory written by `nextlat export`.
        device: "cuda" if there is one, else "cpu".
        dtype: fp32 on a CPU, else the dtype of the stored weights.
        cuda_graphs: on a GPU, capture steps in CUDA graphs; the first steps of each shape are slow then.

    Raises:
        UserError: no export, no plain Llama, or a predictor that belongs to other base weights.
    """
    export = Path(export)
    weights = load_base_weights(export)
    digest = weights_sha256(weights)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else weights["model.embed_tokens.weight"].dtype
    config, graphs = LlamaConfig.from_directory(export), None
    if cuda_graphs and torch.device(device).type == "cuda":
        llama: Llama = StaticLlama(config, weights, device, dtype, capture=True)
        graphs = Graphs(capture=True)
    else:
        llama = Llama(config, weights, device, dtype)
    drafter: Drafter | None = None
    directory = None
    predictor = load_predictor(export, digest)
    if predictor is not None:
        drafter = LatentPredictor(predictor.config, predictor.weights, llama, predictor.draft_vocabulary, graphs)
        directory = export / PREDICTOR_DIRECTORY
    elif (mtp := load_mtp(export, digest)) is not None:
        drafter = MultiTokenPrediction(*mtp, llama)
        directory = export / MTP_DIRECTORY
    return Decoder(export, llama, drafter, directory)
