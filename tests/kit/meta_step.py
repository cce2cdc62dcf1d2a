"""A training step of a rank of a large layout, without its GPU: what it would ask of the host, and what it would keep.

    python -m tests.kit.meta_step RANKS CASES     (a JSON list of [name in `PLANTED`, ["KEY=VALUE", …]])

Layers of the shipped 1.3B configuration on meta tensors, in a fake group of so many ranks; prints the findings of each
case as a JSON list. A process of its own, because it has one group of ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nextlat_dist.bench.meta_tensors import fake_ranks, meta_config, on_meta

HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
MOVES = ("_to_copy", "copy_", "to.", "lift_fresh")
ROWS, LENGTH = 4, 1280  # a length that is no width


class Watch(TorchDispatchMode):
    """Every operation of a step.

    Attributes:
        host_reads: operations that make the host wait for the device.
        mixed: operations on tensors of the device and of the host.
        collectives_on_host: collectives over tensors of the host.
        dense: shapes of tensors with a row's length squared.
        logits: the most elements of a tensor whose last dimension is a vocabulary, by precision.
    """

    def __init__(self, length: int, vocabularies: set[int], weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self._length, self._vocabularies, self._weights = length, vocabularies, weights
        self.host_reads: list[str] = []
        self.mixed: list[str] = []
        self.collectives_on_host: list[str] = []
        self.dense: set[tuple[int, ...]] = set()
        self.logits: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, devices = str(func), set()
        for value in _tensors((args, kwargs or {})):
            if value.ndim or "c10d" in name:
                devices.add(value.device.type)
        if "meta" in devices and any(read in name for read in HOST_READS):
            self.host_reads.append(name)
        if len(devices) > 1:
            self.mixed.append(name)
        if "c10d" in name and "cpu" in devices:
            self.collectives_on_host.append(name)
        out = func(*args, **(kwargs or {}))
        for value in _tensors(out):
            self._look_at(value)
        return out

    def _look_at(self, tensor: torch.Tensor) -> None:
        shape = tuple(tensor.shape)
        if shape[-2:] == (self._length, self._length):
            self.dense.add(shape)
        if shape and shape[-1] in self._vocabularies and shape not in self._weights:
            kind = str(tensor.dtype).removeprefix("torch.")
            self.logits[kind] = max(self.logits.get(kind, 0), tensor.numel() // shape[-1])

    def findings(self) -> dict[str, Any]:
        return {
            "host_reads": self.host_reads,
            "mixed": self.mixed,
            "collectives_on_host": self.collectives_on_host,
            "dense": sorted(self.dense),
            "rows_of_logits": self.logits,
        }


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def step(planted: str, overrides: list[str]) -> dict[str, Any]:
    """Forward and backward pass of every pipeline stage, each of which a rank has: in one module, from a message that
    another stage may have sent.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    config, dims = meta_config("fineweb_edu_1p3b", ["model.num_layers=2", f"data.sequence_length={LENGTH}", *overrides])
    size = dims.tensor_size
    from nextlat_dist.model.decoder_layer import set_documents
    from nextlat_dist.model.layer_list import LayerStack, layer_list
    from nextlat_dist.model.rows import Batch
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import term_counts, term_weights
    from nextlat_dist.plan.stages import stage_layers
    from nextlat_dist.training.engine.pipeline import stage_bounds
    from nextlat_dist.training.engine.step_terms import StepTerms

    entries = layer_list(config, dims, torch.float32)
    bounds = stage_bounds(entries, stage_layers(config))
    parts = [entries[begin:end] for begin, end in itertools.pairwise(bounds)]
    stages = [on_meta(lambda part=part: LayerStack(part), torch.bfloat16) for part in parts]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]
    batch = Batch.of(*[torch.zeros(ROWS, LENGTH + 1, dtype=torch.int32, device="meta") for _ in range(4)])
    local = config.model.padded_vocab_size // size
    real = {min(max(config.model.vocab_size - rank * local, 0), local) for rank in range(size)}
    shapes = {tuple(parameter.shape) for parameter in parameters}
    shapes |= {shape[::-1] for shape in shapes} | {(config.model.hidden_size, vocab) for vocab in {local, *real}}
    watch = Watch(LENGTH, {local, *real}, shapes)
    collect = StepTerms()
    with PLANTED[planted](), watch, _host_reads_of(watch):
        weights = term_weights(term_counts(batch, config.objective), config.objective).float()
        for number, stage in enumerate(stages):
            set_documents(stage, 64)
            set_term_weights(stage, weights)
            message: Any = batch.message
            if number:
                length = LENGTH // (size if config.parallel.sequence_parallel else 1)
                shape = (length, ROWS, config.model.hidden_size)
                message = torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_(), batch.message
            result = stage(message)
            if stage is stages[-1]:
                collect(result, weights).backward()
            else:
                result[0].backward(torch.empty_like(result[0]))
        collect.take(len(weights), torch.device("meta"))
    return {**watch.findings(), "without_gradient": sum(p.grad is None for p in parameters)}


@contextlib.contextmanager
def _host_reads_of(watch: Watch) -> Iterator[None]:
    """A meta tensor has no number to give: asking for one ends the step before an operation is seen."""
    try:
        yield
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        watch.host_reads.append(str(error))


@contextlib.contextmanager
def _wrapped(owner: str, name: str, change: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` followed by `change(result)`."""
    import importlib

    module, _, cls = owner.partition(":")
    holder = getattr(importlib.import_module(module), cls)
    before = getattr(holder, name)
    setattr(holder, name, lambda *args, **kwargs: change(before(*args, **kwargs)))
    try:
        yield
    finally:
        setattr(holder, name, before)


FUSED = "nextlat_dist.objective.losses.fused:VocabularyPass"


def _reads(found: Any) -> Any:
    found.loss.sum().item()
    return found


def _indexes_from_the_host(found: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(RuntimeError):
        return found[torch.arange(len(found), device="cpu")]
    return found


def _copies_in_fp32(found: torch.Tensor) -> torch.Tensor:
    torch.empty(ROWS * LENGTH, 50304, device="meta", dtype=torch.float32)
    return found


def _attends_densely(found: torch.Tensor) -> torch.Tensor:
    torch.ones(ROWS, 1, LENGTH, LENGTH, device="meta", dtype=torch.bool).tril()
    return found


ATTENTION = "nextlat_dist.model.attention:DocumentAttention"
PLANTED: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "none": contextlib.nullcontext,
    "item": lambda: _wrapped(FUSED, "teacher", _reads),
    "cpu-index": lambda: _wrapped(ATTENTION, "forward", _indexes_from_the_host),
    "whole-logits": lambda: _wrapped(ATTENTION, "forward", _copies_in_fp32),
    "dense-mask": lambda: _wrapped(ATTENTION, "forward", _attends_densely),
}


if __name__ == "__main__":
    fake_ranks(int(sys.argv[1]))
    print(json.dumps([step(*case) for case in json.loads(sys.argv[2])]))
