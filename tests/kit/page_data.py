"""Files that the pages' commands need when they are run: a checkout's folders, texts, a tiny run in runs/quickstart."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from pyarrow import parquet

from tests.kit.commands import run
from tests.kit.jobs import tiny_config
from tests.kit.pages import ROOT

SENTENCE = "def main(argument):\n    return argument + 1  # the {number}th of many lines of a small program\n"


def checkout(directory: Path) -> None:
    for name in ("configs", "launch", "examples"):
        (directory / name).symlink_to(ROOT / name)


def texts(number: int = 40) -> list[str]:
    """Lines that differ, of which a tokenizer of 300 ids can be made."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]
    return [
        SENTENCE.format(number=i) + " ".join(words[(i * k) % len(words)] for k in range(1, 12)) + "\n"
        for i in range(number)
    ]


def corpus(directory: Path) -> None:
    """corpus/ with text and JSONL, fineweb_edu/ with Parquet, tars/ with one text per record."""
    (directory / "corpus").mkdir()
    (directory / "corpus/a.txt").write_text("".join(texts()))
    (directory / "corpus/b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    (directory / "fineweb_edu").mkdir()
    parquet.write_table(pa.table({"text": texts()}), directory / "fineweb_edu/000.parquet")
    (directory / "tars").mkdir()
    with tarfile.open(directory / "tars/000.tar", "w") as tar:
        for number, text in enumerate(texts()):
            info = tarfile.TarInfo(f"{number:04d}.txt")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def _dataset(directory: Path, output: str) -> None:
    """corpus/ as `output`/train and `output`/validation, with corpus/tokenizer.model."""
    tokenizer = ["--tokenizer", "corpus/tokenizer.model"]
    if not (directory / "corpus/tokenizer.model").exists():
        run(
            directory,
            "nextlat-data",
            "tokenizer",
            "--input",
            "corpus/",
            *("--output", tokenizer[1]),
            "--vocab-size",
            "300",
        )
    run(
        *(directory, "nextlat-data", "shard", "--input", "corpus/b.jsonl", *tokenizer, "--output", output),
        *("--validation-fraction", "0.3"),
    )


def mixture(directory: Path) -> None:
    """run.yaml, a mixture of two small datasets."""
    corpus(directory)
    for name in ("web", "code"):
        _dataset(directory, f"data/{name}")
    sources = [{"name": name, "path": f"data/{name}/train", "weight": 0.5} for name in ("web", "code")]
    (directory / "run.yaml").write_text(yaml.safe_dump({"data": {"sources": sources, "sequence_length": 32}}))


def small_run(directory: Path) -> None:
    """run.yaml, a few steps of a tiny model on a small dataset."""
    corpus(directory)
    _dataset(directory, "data")
    config = tiny_config(model={"vocab_size": 300}, data={"train": "data/train"})
    (directory / "run.yaml").write_text(yaml.safe_dump(_of_few_steps(config)))


def quickstart(directory: Path) -> None:
    """runs/quickstart as the quickstart leaves it, from a few steps of a tiny model."""
    corpus(directory)
    root = directory / "runs/quickstart"
    _dataset(directory, "runs/quickstart/data")
    (root / "prompts").mkdir()
    for domain in ("code", "prose"):
        prompts = [{"name": f"{domain}-{i}", "prompt": text[:40]} for i, text in enumerate(texts(6))]
        (root / f"prompts/{domain}.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    _train_and_export(
        directory,
        tiny_config(
            model={"vocab_size": 300, "max_position_embeddings": 128},
            objective={"horizon": 2},
            data={"train": "runs/quickstart/data/train", "validation": "runs/quickstart/data/validation"},
        ),
        "runs/quickstart",
    )
    calibrate = "nextlat calibrate --export runs/quickstart/export --prompts runs/quickstart/prompts --temperature 0"
    run(directory, *calibrate.split(), *["--batch-size", "1,2", "--prompts-per-domain", "1", "--max-new-tokens", "8"])


def hidden_markov(directory: Path) -> None:
    """A and B, exports of a GPT and its NextLat twin, and hmm/, the process they learnt from."""
    draw = "nextlat-data task hmm --process mess3 --x 0.05 --alpha 0.75 --length 8 --train 60 --test 20 --output hmm"
    run(directory, *draw.split())
    for name, objective in (("A", "next_token"), ("B", "nextlat")):
        config = tiny_config(
            model={"num_layers": 1, "vocab_size": 7, "make_vocab_size_divisible_by": 1, "max_position_embeddings": 16},
            objective={"name": objective, "horizon": 2},
            data={"train": "hmm/train", "packing": "pad", "sequence_length": 8},
        )
        _train_and_export(directory, config, f"runs/{name}")
        (directory / name).symlink_to(f"runs/{name}/export")


def _train_and_export(directory: Path, config: dict[str, Any], output: str) -> None:
    (directory / output).mkdir(parents=True, exist_ok=True)
    (directory / output / "small.yaml").write_text(yaml.safe_dump({**_of_few_steps(config), "output_dir": output}))
    run(directory, "nextlat", "train", "--config", f"{output}/small.yaml")
    run(directory, "nextlat", "export", "--checkpoint", f"{output}/checkpoints", "--output", f"{output}/export")


def _of_few_steps(config: dict[str, Any]) -> dict[str, Any]:
    training = {**config["training"], "log_interval": 1, "peak_tflops_per_device": 0.1, "validation_batches": 1}
    training["train_tokens"] = 4 * training["global_batch_size"] * config["data"]["sequence_length"]
    return {**config, "training": training}


Prepare = Callable[[Path], None]
