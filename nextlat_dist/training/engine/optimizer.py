"""AdamW, its parameter groups, and the learning rate over tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nextlat_dist.config.schema import OptimizerConfig, ScheduleConfig
from nextlat_dist.model.initialize import canonical_parameters


def learning_rate(tokens: int, total_tokens: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of the step that begins after `tokens` tokens; a pure function, so a resume needs no state.

    Linear warm-up to `peak`, then constant; cosine to `min_lr`; or wsd: constant, then linear to `min_lr` over the last
    `decay_tokens`.
    """
    if tokens < schedule.warmup_tokens:
        return peak * (tokens + 1) / (schedule.warmup_tokens + 1)
    floor = schedule.min_lr
    if schedule.name == "cosine":
        span = max(1, total_tokens - schedule.warmup_tokens)
        done = min(1.0, (tokens - schedule.warmup_tokens) / span)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if schedule.name == "wsd" and schedule.decay_tokens > 0:
        left = max(0, total_tokens - tokens)
        if left < schedule.decay_tokens:
            return floor + (peak - floor) * left / schedule.decay_tokens
    return peak


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch AdamW over two groups: matrices with weight decay, norms and biases without."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in canonical_parameters(module):
        # Under ZeRO-3 a parameter may already be partitioned to one dimension; its ds_shape is the real one.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (matrices if dimensions > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(beta1, beta2), eps=config.eps)


def set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def clip_before_step(
    optimizer: torch.optim.Optimizer, max_norm: float, model_group: dist.ProcessGroup, tensor_rank: int
) -> None:
    """Give a plain optimizer (ZeRO-0) the exact global gradient norm, as `_global_grad_norm`, and clipping to
    `max_norm`.

    DeepSpeed's own fp32 clipping keeps no norm and counts a tied embedding once per pipeline stage that holds it.
    """

    def hook(inner: Any, *_: Any) -> None:
        parameters = [p for group in inner.param_groups for p in group["params"] if p.grad is not None]
        norm = global_gradient_norm(parameters, model_group, tensor_rank)
        inner._global_grad_norm = norm
        if 0 < max_norm < norm:
            for parameter in parameters:
                parameter.grad.mul_(max_norm / (norm + 1e-6))

    optimizer.register_step_pre_hook(hook)


def global_gradient_norm(parameters: Iterable[nn.Parameter], model_group: dist.ProcessGroup, tensor_rank: int) -> float:
    """L2 norm over every distinct parameter: replicated ones count once, tied ones on their first stage."""
    total = None
    for parameter in parameters:
        assert parameter.grad is not None
        if getattr(parameter, "ds_pipe_replicated", False):
            continue
        if tensor_rank != 0 and not getattr(parameter, "tensor_model_parallel", False):
            continue
        square = parameter.grad.detach().double().square().sum()
        total = square if total is None else total + square
    if total is None:
        total = torch.zeros((), dtype=torch.float64)
    dist.all_reduce(total, group=model_group)
    return float(total.sqrt())
