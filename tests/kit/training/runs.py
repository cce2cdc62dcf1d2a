"""Tiny real training runs: their configuration, their steps, what they logged and what they saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, TensorReader
from tests.kit import jobs


def run_training(raw: dict[str, Any]) -> None:
    from nextlat_dist.training.run import train

    config, _ = jobs.set_up(raw)
    torch.rand(1)  # two runs of one process never begin with the same random state
    train(config)


def run_training_as_typed(raw: dict[str, Any], words: list[str]) -> None:
    """As started from a command line of these words."""
    typed, sys.argv = sys.argv, words
    try:
        run_training(raw)
    finally:
        sys.argv = typed


def training_config(output: Path, dataset: Path, parallel: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """Six steps on real text; each packs many documents with masked prompts."""
    steps, rows, length = 6, 4, 48
    raw = jobs.tiny_config(
        model={"vocab_size": 600},
        data={
            "train": str(dataset / "train"),
            "validation": str(dataset / "validation"),
            "sequence_length": length,
        },
        parallel=parallel,
        training={
            "micro_batch_size": 1,
            "global_batch_size": rows,
            "train_tokens": steps * rows * length,
            "log_interval": 1,
            "validation_batches": 2,
            **training,
        },
        checkpoint={"save_interval": 3, "keep_last": 3},
    )
    return {**raw, "output_dir": str(output)}


def logged(output: Path) -> dict[int, dict[str, float]]:
    """Every training line by step, without what depends on the clock."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "tokens_per_second", "mfu", "straggler_", "seconds/", "peak_memory_gigabytes")
    return {
        line["step"]: {key: value for key, value in line.items() if not key.startswith(clock)}
        for line in lines
        if "loss" in line
    }


STEPS = 3


def start(raw: dict[str, Any]) -> Any:
    from nextlat_dist.training.engine.build import build_engine

    config, dims = jobs.set_up(raw)
    return config, dims, build_engine(config, dims)


def save(config: Any, dims: Any, engine: Any, state: Any, root: Path) -> None:
    from nextlat_dist.training.state.saving import Saver

    saver = Saver(config, dims, engine, root, None)
    saver.save(state)
    assert [outcome.error for outcome in saver.finish()] == [""]
    saver.close()


def train_and_save(raw: dict[str, Any], root: Path) -> list[dict[str, float]]:
    """Metrics of the steps after the checkpoint, without any reshaping."""
    from nextlat_dist.training.state.trainer_state import TrainerState

    config, dims, engine = start(raw)
    jobs.train_steps(engine, config, dims, range(STEPS))
    save(config, dims, engine, TrainerState(step=STEPS), root)
    return jobs.train_steps(engine, config, dims, range(STEPS, 2 * STEPS))


def go_on(raw: dict[str, Any], source: Path, target: Path) -> list[dict[str, float]]:
    """Load a checkpoint into this layout, save that, and train on."""
    from nextlat_dist.checkpoint.commit import find_checkpoint
    from nextlat_dist.training.state.resume import resume_state
    from nextlat_dist.training.state.trainer_state import read_state

    config, dims, engine = start(raw)
    checkpoint = find_checkpoint(source)
    assert checkpoint is not None
    state = read_state(checkpoint)
    assert (state.step, state.optimizer_step) == (STEPS, STEPS)
    resume_state(dims, engine, checkpoint, state)
    save(config, dims, engine, state, target)
    return jobs.train_steps(engine, config, dims, range(STEPS, 2 * STEPS))


def tensors(root: Path) -> dict[tuple[str, str], torch.Tensor]:
    with TensorReader(root / f"step_{STEPS:08d}") as reader:
        return {(name, key): reader.full(name, key) for name in reader.names for key in (WEIGHT, *MOMENTS)}


def assert_same_state(left: Path, right: Path) -> None:
    before, after = tensors(left), tensors(right)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
