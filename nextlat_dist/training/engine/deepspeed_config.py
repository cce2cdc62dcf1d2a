"""The DeepSpeed configuration: ours, with the user's raw `deepspeed:` settings merged under it.

Ours decide batch arithmetic, ZeRO stage, precision and clipping; a raw setting that contradicts them is an error that
names our key. Everything else passes through untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError

_OWNED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "communication_data_type": "training.communication_data_type",
    "pipeline.pipe_partitioned": "parallel.sequence_parallel",
    "pipeline.grad_partitioned": "parallel.sequence_parallel",
    "data_types.grad_accum_dtype": "training.precision (gradients always accumulate in fp32)",
}
# Settings that DeepSpeed would choose worse: its timer makes the host wait for the device twice in every micro-batch,
# bf16 gradients would be kept and passed over once more before they are added up in fp32, and a bucket of 500 million
# elements is 2 GB of a device and copies every gradient (one of 10 million, 40 MB, is past what a network needs).
_UNLESS_GIVEN: tuple[tuple[str, str, Any], ...] = (
    ("timers", "throughput", {"enabled": False}),
    ("bf16", "immediate_grad_update", True),
    ("zero_optimization", "reduce_bucket_size", 10_000_000),
)
_FORBIDDEN = {
    "optimizer": "the optimizer section",
    "scheduler": "the schedule section",
}


def deepspeed_config(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        UserError: a raw setting contradicts one of our keys.
    """
    training = config.training
    accumulation = training.global_batch_size // (training.micro_batch_size * data_parallel_size)
    ours: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.clip_grad,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": False},
        "communication_data_type": training.communication_data_type,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if config.parallel.sequence_parallel:
        # DeepSpeed sends a part of a stage's output from each tensor rank, as if all had the same; these have parts.
        ours["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    merged = copy.deepcopy(config.deepspeed)
    merged.setdefault("zero_allow_untested_optimizer", True)
    merged.setdefault("steps_per_print", None)
    for section, key, value in _UNLESS_GIVEN:
        node = merged.setdefault(section, {})
        if isinstance(node, dict):
            node.setdefault(key, value)
    for key, section in _FORBIDDEN.items():
        if key in merged:
            raise UserError(f"deepspeed.{key} is set, but {section} of this config decides it; remove deepspeed.{key}")
    _merge(merged, ours, "")
    merged["gradient_clipping"] = 0.0  # by the exact norm, by `deepspeed_engine`
    return merged


def _merge(target: dict[str, Any], ours: dict[str, Any], prefix: str) -> None:
    for key, value in ours.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            node = target.setdefault(key, {})
            if not isinstance(node, dict):
                raise UserError(f"deepspeed.{path} is {node!r}, it must be a mapping")
            _merge(node, value, f"{path}.")
        elif key in target and target[key] != value:
            raise UserError(
                f"deepspeed.{path} is {target[key]!r} but {_OWNED[path]} makes it {value!r}; "
                f"remove deepspeed.{path} and set {_OWNED[path].split(' ')[0]}"
            )
        else:
            target[key] = value


@contextmanager
def without_extension() -> Iterator[None]:
    """Inside, DeepSpeed does not load its CPU extension `deepspeed_shm_comm`.

    That one reduces tensors in inference engines alone; training never calls it. Loading it takes a C++ compiler and
    minutes at the first start, waits in silence where a killed build left its lock, and leaves 66 MB per rank in
    /dev/shm at every start, for good: DeepSpeed 0.19.8 never removes them.
    """
    from deepspeed.ops import __compatible_ops__ as loadable

    name = "deepspeed_shm_comm"
    known, loadable[name] = loadable.get(name), False
    try:
        yield
    finally:
        if known is None:
            del loadable[name]
        else:
            loadable[name] = known
