"""Model weights in a checkpoint: safetensors by canonical name, one file per tensor x pipeline rank, fp32.

    weights/tp0_pp0.safetensors …

They are our own copy beside DeepSpeed's state, so that export and inspection need neither DeepSpeed nor unpickling.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nextlat_dist.checkpoint.commit import read_manifest, verify
from nextlat_dist.model.sharding import merge, sharding_of

DIRECTORY = "weights"


def weights_file(tensor_rank: int, pipeline_rank: int) -> str:
    return f"{DIRECTORY}/tp{tensor_rank}_pp{pipeline_rank}.safetensors"


def save_weights(checkpoint: Path, weights: dict[str, torch.Tensor], tensor_rank: int, pipeline_rank: int) -> None:
    """Write this rank's shards {canonical name: fp32 tensor}; once per (tensor, pipeline) rank."""
    path = checkpoint / weights_file(tensor_rank, pipeline_rank)
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)


def load_full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters of a committed checkpoint, tensor-parallel shards merged, {canonical name: fp32 tensor}.

    Raises:
        UserError: a weight file is missing or damaged.
    """
    verify(checkpoint, lambda name: name.startswith(DIRECTORY + "/"))
    topology = read_manifest(checkpoint)["topology"]
    full: dict[str, torch.Tensor] = {}
    for pipeline_rank in range(topology["pipeline"]):
        shards = [load_file(checkpoint / weights_file(t, pipeline_rank)) for t in range(topology["tensor"])]
        for name in shards[0]:
            assert name not in full, name
            full[name] = merge([part[name] for part in shards], sharding_of(name))
    return full
