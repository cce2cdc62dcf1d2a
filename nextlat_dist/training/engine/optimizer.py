"""AdamW, its parameter groups, and the learning rate over tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nextlat_dist.checkpoint.tensors import MOMENTS
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


PART = "part"  # key of a parameter group: 0 the base, 1 what is trained apart from it


def build_optimizer(module: nn.Module, config: OptimizerConfig, apart: str | None = None) -> torch.optim.AdamW:
    """torch AdamW over two groups: matrices with weight decay, norms and biases without.

    Args:
        apart: the first word of the names of parameters that have two groups of their own, after the others: a
            partition of ZeRO holds the very elements of the base that it would hold without them.
    """
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in canonical_parameters(module):
        part = int(apart is not None and name.partition(".")[0] == apart)
        found.setdefault((part, parameter.ndim > 1), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": found.get((part, matrices), []),
            "weight_decay": config.weight_decay if matrices else 0.0,
            PART: part,
        }
        for part in (0, 1)
        for matrices in (True, False)
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: Any, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def ensure_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, Any]:
    """AdamW makes its state in its first step; this is the same a step early.

    `fused` and `capturable` count the steps on the device and refuse a count on the host.
    """
    state: dict[str, Any] = optimizer.state[flat]
    if not state:
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state
