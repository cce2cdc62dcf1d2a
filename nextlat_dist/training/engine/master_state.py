"""The training state of an engine: every parameter's fp32 master weight and Adam moments, as views.

The same functions for all engines and layouts, so that a checkpoint does not depend on ZeRO stages; where an engine
keeps its state, its binding knows (`protocol.StateViews`).
"""

from __future__ import annotations

from collections.abc import Sequence

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, Fragment, TensorReader
from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.model.sharding import shard, sharding_of
from nextlat_dist.parallel.dims import ParallelDims
from nextlat_dist.training.engine.protocol import StateViews


def local_fragments(engine: StateViews) -> list[Fragment]:
    """All state that this rank holds, replicas included."""
    fragments = (engine.fragment(name, parameter) for name, parameter in canonical_parameters(engine.module))
    return [fragment for fragment in fragments if fragment is not None]


def own_fragments(engine: StateViews, dims: ParallelDims) -> list[Fragment]:
    """The state that this rank is to save: over all ranks, every element once."""
    copies = {name for name, parameter in canonical_parameters(engine.module) if engine.is_tied_copy(parameter)}
    own = []
    for number, fragment in enumerate(local_fragments(engine)):
        if fragment.name in copies:
            continue
        if dims.tensor_rank != 0 and not sharding_of(fragment.name, engine.sharding).splits(dims.tensor_size):
            continue
        if engine.every_data_rank_holds_all and number % dims.data_size != dims.data_rank:
            continue
        own.append(fragment)
    return own


def load_state(engine: StateViews, dims: ParallelDims, reader: TensorReader, steps: Sequence[int]) -> None:
    """Put a checkpoint's state into `engine`, cut for this rank. `steps`: the optimizer's, with each part.

    Raises:
        UserError: the checkpoint lacks a parameter, or holds it in another shape.
    """
    for name, parameter in canonical_parameters(engine.module):
        fragment = engine.fragment(name, parameter)
        for key in (WEIGHT, *MOMENTS):
            full = reader.full(name, key)
            local = shard(full, sharding_of(name, engine.sharding), dims.tensor_rank, dims.tensor_size).flatten()
            if key == WEIGHT:
                engine.set_weight(parameter, local)
            if fragment is not None:
                target = fragment.values[key]
                target.copy_(local[fragment.start : fragment.start + target.numel()])
    engine.set_optimizer_steps(steps)
