"""A step makes the host wait for the device twice, whatever the layout, and never per micro-batch.

Counted on a CPU, where every read of a number from a tensor is seen with the line that asks for it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kit.harness import Ranks
from tests.kit.training.runs import training_config

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.")
METHODS = ("tolist", "numpy", "cpu")
WATCHING = ("__torch_dispatch__", "note", "noted")
# On a CPU alone: documents of one length go together, and masked rows are left out. An accelerator has other ways.
ON_CPU = ("model/attention.py:of", "losses/chunks.py:", "losses/rollout.py:", "data/", "reporting/")
# Of numbers that lie on the host: our answer to DeepSpeed's question for the gradient norm; the counts of a batch; the
# sums that were exchanged.
ON_HOST = (
    "deepspeed/runtime/utils.py:is_invalid_grad_norm",
    "objective/terms.py:has_targets",
    "training/health/guards.py:_may_be_applied",
)


class Reads(TorchDispatchMode):
    """Numbers read from tensors, by the function that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(read in str(func) for read in READS):
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.name not in WATCHING]
        where = frames[-1].filename.rpartition("nextlat_dist/")[2].rpartition("site-packages/")[2]
        self.sites[f"{where}:{frames[-1].name}"] += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch, self:
            for name in METHODS:
                original = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, self._noted(original))
            yield

    def _noted(self, original: Any) -> Any:
        def noted(*arguments: Any, **named: Any) -> Any:
            self.note()
            return original(*arguments, **named)

        return noted


def reads_of_steps(raw: dict[str, Any], first: int, plant: bool = False) -> dict[str, float]:
    """Train; reads per step from the `first` on. `plant`: a mistake, a loss that is looked at in every micro-batch."""
    from nextlat_dist.training.engine.step_terms import StepTerms
    from nextlat_dist.training.loop import Trainer
    from tests.kit.training.runs import run_training

    reads, steps = Reads(), 0
    step, read, call = Trainer._step, Trainer._next_batch, StepTerms.__call__

    def watched(self: Trainer, batch: Any) -> bool:
        nonlocal steps
        if self.state.step < first:
            return step(self, batch)
        steps += 1
        with reads.watching():
            return step(self, batch)

    def next_batch(self: Trainer) -> Any:
        if self.state.step <= first:
            return read(self)
        with reads.watching():
            return read(self)

    def looked_at(self: StepTerms, *arguments: Any) -> torch.Tensor:
        loss = call(self, *arguments)
        assert loss.item() > 0
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        patch.setattr(Trainer, "_next_batch", next_batch)
        if plant:
            patch.setattr(StepTerms, "__call__", looked_at)
        run_training(raw)
    assert steps >= 3
    return {site: count / steps for site, count in reads.sites.items()}


def config(tmp_path: Path, dataset: Path, parallel: dict[str, Any], **training: Any) -> dict[str, Any]:
    raw = training_config(tmp_path, dataset, parallel, {"validation_batches": 0, "log_interval": 100, **training})
    raw["checkpoint"] = {"save_interval": 0}
    return raw


LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "zero0": ("one_rank", {"zero_stage": 0}, {}),
    "zero1": ("one_rank", {"zero_stage": 1}, {}),
    "zero1-bf16": ("one_rank", {"zero_stage": 1}, {"precision": "bf16"}),
    "zero2": ("one_rank", {"zero_stage": 2}, {}),
    "zero2-bf16": ("one_rank", {"zero_stage": 2}, {"precision": "bf16"}),
    "zero3": ("one_rank", {"zero_stage": 3}, {}),
    "pp2": ("two_ranks", {"pipeline_model_parallel_size": 2, "zero_stage": 0}, {}),
    "pp2-zero1": ("two_ranks", {"pipeline_model_parallel_size": 2, "zero_stage": 1}, {}),
    "tp2": ("two_ranks", {"tensor_model_parallel_size": 2, "zero_stage": 1}, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_reads_a_step(layout: str, tmp_path: Path, text_dataset: Path, request: pytest.FixtureRequest) -> None:
    pool, parallel, training = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue(pool)
    for found in ranks.run(reads_of_steps, config(tmp_path, text_dataset, parallel, **training), 3):
        rest = {site: count for site, count in found.items() if not any(part in site for part in (*ON_CPU, *ON_HOST))}
        assert rest.pop("training/batches.py:of") == 2 / 3  # the counts of the batch, watched in two of three
        assert rest == {"training/health/guards.py:_exchange": 1}  # the verdict


def test_a_loss_that_is_looked_at_is_found(tmp_path: Path, text_dataset: Path, one_rank: Ranks) -> None:
    (found,) = one_rank.run(reads_of_steps, config(tmp_path, text_dataset, {"zero_stage": 1}), 3, True)
    assert {site: count for site, count in found.items() if "looked_at" in site} == {f"{__file__}:looked_at": 4}, found
