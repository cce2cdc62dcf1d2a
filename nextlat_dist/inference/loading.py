"""From an export to what decodes it.

load(export: Path | str, device: str | None = None, dtype: torch.dtype | str | None = None) -> Decoder
decoder_of(opened: OpenedExport, …) -> Decoder        the same of an export that is open already
llama_of(opened: OpenedExport, …) -> Llama            its base model alone
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nextlat_dist.config.entries import resolve
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference import arguments
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.engine.graphs import Graphs, StaticLlama
from nextlat_dist.inference.engine.llama import Llama


def load(
    export: Path | str,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    cuda_graphs: bool = True,
) -> Decoder:
    """The decoder of an export directory.

    Args:
        export: a directory written by `nextlat export`.
        device: "cuda" if there is one, else "cpu".
        dtype: torch's or its name, such as "bfloat16"; None: fp32 on a CPU, else the dtype of the stored weights.
        cuda_graphs: on a GPU, capture steps in CUDA graphs; the first steps of each shape are slow then.

    Raises:
        UserError: no export, no plain Llama, a drafter that belongs to other base weights or is of an unknown kind, a
            device that is not there, or a dtype that is none.
    """
    return decoder_of(open_export(export), device, dtype, cuda_graphs=cuda_graphs)


def decoder_of(
    opened: OpenedExport,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    cuda_graphs: bool = True,
) -> Decoder:
    """As `load`, of an opened export."""
    llama = llama_of(opened, device, dtype, cuda_graphs=cuda_graphs)
    drafter = None
    if opened.drafter is not None:
        graphs = Graphs(capture=True) if isinstance(llama, StaticLlama) else None
        drafter = opened.drafter.kind.build(opened.drafter, llama, graphs)
    return Decoder(opened, llama, drafter)


def llama_of(
    opened: OpenedExport,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    context: int = 0,
    cuda_graphs: bool = False,
) -> Llama:
    """The base model of an opened export; the other arguments as for `load`.

    Args:
        context: positions that it must reach, where the context was trained shorter.
    """
    device, dtype = arguments.device(device) or default_device(), arguments.dtype(dtype)
    if dtype is None:
        dtype = (
            torch.float32 if torch.device(device).type == "cpu" else opened.weights["model.embed_tokens.weight"].dtype
        )
    config = opened.config
    if context > config.max_position_embeddings:
        config = replace(config, max_position_embeddings=context)
    if cuda_graphs and torch.device(device).type == "cuda":
        static: Llama = resolve(config.form.static_engine)(config, opened.weights, device, dtype, capture=True)
        return static
    plain: Llama = resolve(config.form.engine)(config, opened.weights, device, dtype)
    return plain


def default_device() -> str:
    """Where a model runs if nobody says: "cuda" if there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
