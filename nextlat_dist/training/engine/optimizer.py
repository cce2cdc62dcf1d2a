"""AdamW, its parameter groups, and the learning rate over tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
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
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
