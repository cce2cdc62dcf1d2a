"""From text to an export in one script: a dataset, a tiny NextLat run on this machine, a Hugging Face directory.

python examples/train_and_export.py OUTPUT
"""

import json
import sys
from pathlib import Path

from data_tools.cli import main as nextlat_data
from nextlat_dist import export, train
from nextlat_dist.config import config_from_dict


def main(output: Path) -> None:
    text = ["--input", str(Path(json.__file__).parent), "--glob", "*.py"]  # the sources of Python's own json module
    tokenizer, data = str(output / "tokenizer.model"), str(output / "data")
    for command in (
        ["tokenizer", *text, "--output", tokenizer, "--vocab-size", "512"],
        ["shard", *text, "--tokenizer", tokenizer, "--output", data],
    ):
        if status := nextlat_data(command):
            sys.exit(status)

    config = {
        "output_dir": str(output),
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 512},
        "objective": {"name": "nextlat", "horizon": 2},
        "data": {"train": data, "sequence_length": 32},
        "training": {"train_tokens": 4096, "log_interval": 1},
    }
    result = train(config_from_dict(config))
    print(f"{result.steps} steps, last loss {result.metrics['loss']:.3f}")
    export(result.checkpoints, output / "export")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
