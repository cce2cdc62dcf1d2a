"""Where a DeepSpeed engine keeps the training state: every parameter's fp32 master weight and Adam moments, as views.

One function for all engines, so that a checkpoint does not depend on ZeRO stages:

- ZeRO 0: the parameters themselves and the plain optimizer's state; every data-parallel rank has all of it.
- ZeRO 1 and 2, and DeepSpeed's bf16 optimizer: a flat partition per parameter group and rank.
- ZeRO 3: a flat partition per sub-group and rank, with a padded share of every parameter.

Written for DeepSpeed 0.19.8, whose `safe_get_full_optimizer_state` fails for all groups but the first after the first
step, and whose own checkpoints are pickles that only the same layout can read.
"""

from __future__ import annotations

from typing import Any

import torch

from nextlat_dist.checkpoint.tensors import MOMENTS, WEIGHT, Fragment, TensorReader
from nextlat_dist.model.initialize import canonical_parameters
from nextlat_dist.model.sharding import shard, sharding_of
from nextlat_dist.parallel.dims import ParallelDims
from nextlat_dist.training.engine.build import Engine


def local_fragments(engine: Engine) -> list[Fragment]:
    """All state that this rank holds, replicas included."""
    found = []
    for name, parameter in canonical_parameters(engine.module):
        fragment = _fragment(engine, name, parameter)
        if fragment is not None:
            found.append(fragment)
    return found


def own_fragments(engine: Engine, dims: ParallelDims) -> list[Fragment]:
    """The state that this rank is to save: over all ranks, every element once."""
    replicated = {
        name
        for name, parameter in canonical_parameters(engine.module)
        if getattr(parameter, "ds_pipe_replicated", False)
    }
    plain = _zero_stage(engine) == 0
    own = []
    for number, fragment in enumerate(local_fragments(engine)):
        if fragment.name in replicated:  # a tied weight of a later stage
            continue
        if sharding_of(fragment.name, engine.sharding).dim is None and dims.tensor_rank != 0:
            continue
        if plain and number % dims.data_size != dims.data_rank:
            continue
        own.append(fragment)
    return own


def optimizer_step(engine: Engine) -> int:
    """Steps that Adam has taken."""
    # The largest: a partition of nothing but padding begins to count anew after a resume.
    return max((int(state["step"]) for state in _base_optimizer(engine).state.values() if state), default=0)


def load_state(engine: Engine, dims: ParallelDims, reader: TensorReader, step: int) -> None:
    """Put a checkpoint's state into `engine`, cut for this rank. `step`: Adam's.

    Raises:
        UserError: the checkpoint lacks a parameter, or holds it in another shape.
    """
    for name, parameter in canonical_parameters(engine.module):
        fragment = _fragment(engine, name, parameter)
        for key in (WEIGHT, *MOMENTS):
            full = reader.full(name, key)
            local = shard(full, sharding_of(name, engine.sharding), dims.tensor_rank, dims.tensor_size).flatten()
            if key == WEIGHT:
                _set_model_weight(parameter, local)
            if fragment is not None:
                target = fragment.values[key]
                target.copy_(local[fragment.start : fragment.start + target.numel()])
    for state in _base_optimizer(engine).state.values():
        state["step"].fill_(step)


def _set_model_weight(parameter: torch.nn.Parameter, local: torch.Tensor) -> None:
    """The copy that the forward pass uses, in its own precision."""
    with torch.no_grad():
        if hasattr(parameter, "ds_tensor"):
            partition = parameter.ds_tensor
            begin = _zero3_start(parameter)
            mine = local[begin : begin + partition.numel()]
            partition.data.view(-1)[: mine.numel()].copy_(mine)
        else:
            parameter.data.view(-1).copy_(local)


def _zero_stage(engine: Engine) -> int:
    return int(engine.inner.zero_optimization_stage())


def _base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    wrapped: torch.optim.Optimizer = engine.optimizer
    return wrapped if _zero_stage(engine) == 0 else wrapped.optimizer  # type: ignore[attr-defined]


def _ensure_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    """AdamW makes its state in its first step; this is the same a step early."""
    state: dict[str, Any] = optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0)
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def _fragment(engine: Engine, name: str, parameter: torch.nn.Parameter) -> Fragment | None:
    """What this rank holds of a parameter, None for nothing."""
    optimizer = _base_optimizer(engine)
    if hasattr(parameter, "ds_tensor"):
        shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
        group, offset, padded = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        start = _zero3_start(parameter)
        size = min(padded, int(parameter.ds_numel) - start)  # type: ignore[attr-defined]
        flat = engine.optimizer.fp32_partitioned_groups_flat[group]
        if size <= 0:
            return None
    elif _zero_stage(engine) > 0:
        shape = tuple(parameter.shape)
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        flat = optimizer.param_groups[mapping.param_group_index]["params"][0]
    else:
        shape, start, offset, size, flat = tuple(parameter.shape), 0, 0, parameter.numel(), parameter
    state = _ensure_state(optimizer, flat)
    values = {WEIGHT: flat, **{key: state[key] for key in MOMENTS}}
    views = {key: value.detach().view(-1).narrow(0, offset, size) for key, value in values.items()}
    return Fragment(name, shape, start, views)


def _zero3_start(parameter: torch.nn.Parameter) -> int:
    from deepspeed import comm

    return int(parameter.ds_tensor.numel()) * comm.get_rank(group=parameter.ds_process_group)  # type: ignore[attr-defined]
