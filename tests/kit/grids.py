"""A grid of tiny experiments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.kit.jobs import tiny_config


def write_grid(directory: Path, **changes: Any) -> Path:
    """A grid of two variants and a seed, of a few steps each."""
    base = tiny_config(
        model={"num_layers": 1, "vocab_size": 10, "make_vocab_size_divisible_by": 2, "max_position_embeddings": 16},
        objective={"horizon": 2},
        data={"packing": "pad", "sequence_length": 6},
        training={"train_tokens": 480, "log_interval": 1, "peak_tflops_per_device": 1.0},
    )
    (directory / "base.yaml").write_text(yaml.safe_dump(base))
    data = ["task", "state-tracking", "--group", "S3", "--length", 5, "--test-length", 8, "--train", 200, "--test", 20]
    grid = {
        "base": "base.yaml",
        "data": [*data, "--output", "{data}"],
        "settings": {"data.train": "{data}/train"},
        "seeds": [3],
        "variants": {"both": {}, "neither": {"objective.name": "next_token"}},
        "training": {"next_token": "L_ntp", "kl": "L_kl"},
        "evaluations": {
            "task": {
                "arguments": ["task", "--export", "model={export}", "--data", "{data}/test"],
                "numbers": {"model_transformer_1x": "transformer", "model_latent_rnn_1x": "latent RNN"},
            }
        },
    }
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump({**grid, **changes}, sort_keys=False))
    return path
