"""Cross entropy and KL divergence over vocabulary shards: no rank ever holds the whole vocabulary.

Each rank holds logits [..., vocab (local)]; what crosses ranks is one number per position: the maximum, then sums.
Statistics are fp32 (fp64 for fp64 logits). Padded vocabulary columns are -inf on both sides, so the padding never
changes a loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

LARGE = 30.0  # log(q / p) below -30: exp(30) times the smallest q is still finite, and q is nothing next to p


def vocab_parallel_logits(
    hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """hidden [..., h], weight [vocab (local), h] -> logits [..., vocab (local)]; gradients of `hidden` are summed over
    ranks.
    """
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    logits = F.linear(copy_to_tensor_model_parallel_region(hidden, group=group), weight)
    local = weight.shape[0]
    first_padded = vocab_size - group.rank() * local
    if first_padded < local:
        padded = torch.arange(local, device=logits.device) >= first_padded
        logits = logits.masked_fill(padded, float("-inf"))
    return logits


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _maximum(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    maximum = logits.amax(dim=-1)
    if group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    return maximum


def _sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = _wide(logits)
        maximum = _maximum(wide, group)
        local = wide.shape[-1]
        index = targets - group.rank() * local
        here = (index >= 0) & (index < local)
        index = index.clamp(0, local - 1)[..., None]
        exponent = (wide - maximum[..., None]).exp()
        target_logit = torch.where(here, wide.gather(-1, index)[..., 0] - maximum, torch.zeros_like(maximum))
        total, target_logit = _sum_over_ranks(torch.stack([exponent.sum(dim=-1), target_logit]), group)
        ctx.save_for_backward(exponent.div_(total[..., None]), index, here)
        ctx.dtype = logits.dtype
        log_total = total.log()
        log_sum_exp = maximum + log_total
        ctx.mark_non_differentiable(log_sum_exp)
        return log_total - target_logit, log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        softmax, index, here = ctx.saved_tensors
        grad = softmax.scatter_add(-1, index, -here.to(softmax.dtype)[..., None])
        return grad.mul_(grad_loss[..., None]).to(ctx.dtype), None, None


class _KullbackLeibler(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        teacher_log_sum_exp: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """With q the teacher's probabilities, p the student's and e = log(q / p), KL is the mean of e under q. In fp32
        that mean has the rounding of logarithms of size log(vocabulary): a KL of 5e-4 is off by 1e-3 at a position. So
        the value is mean(e) + log(1 + sum(q (exp(-e) - 1))): the same for the true e, and what e is off by cancels but
        for its product with q - p.
        """
        wide, teacher = _wide(student), _wide(teacher)
        maximum = _maximum(wide, group)
        total = _sum_over_ranks((wide - maximum[..., None]).exp().sum(dim=-1), group)
        student_log = wide - (maximum + total.log())[..., None]
        teacher_log = teacher - teacher_log_sum_exp[..., None]
        q = teacher_log.exp()
        log_ratio = torch.where(teacher_log.isneginf(), torch.zeros_like(q), teacher_log - student_log)  # padding: 0
        # p - q; where the teacher has next to nothing, its ratio to the student would overflow, and p is all there is.
        difference = torch.where(log_ratio > -LARGE, q * torch.expm1(-log_ratio), student_log.exp())
        sums = _sum_over_ranks(torch.stack([(q * log_ratio).sum(dim=-1), difference.sum(dim=-1)]), group)
        mean, excess = sums
        # Subtract in fp32, cast later: two matrix products would lose the gradient where student and teacher agree.
        ctx.save_for_backward((difference - q * excess[..., None]) / (1 + excess[..., None]))
        ctx.dtype = student.dtype
        return mean + torch.log1p(excess)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (difference,) = ctx.saved_tensors
        return (difference * grad_output[..., None]).to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log softmax(logits)[target] per position, in nats, and the (detached) log-sum-exp of the whole vocabulary.

    logits [..., vocab (local)], targets [...] global token ids.
    """
    loss, log_sum_exp = _CrossEntropy.apply(logits, targets, group)
    return loss, log_sum_exp


def vocab_parallel_kl(
    student: torch.Tensor, teacher: torch.Tensor, teacher_log_sum_exp: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)) per position, in nats; no gradient reaches the teacher.

    Both logits [..., vocab (local)]; `teacher_log_sum_exp` [...] as returned by `vocab_parallel_cross_entropy`.
    """
    divergence: torch.Tensor = _KullbackLeibler.apply(student, teacher.detach(), teacher_log_sum_exp.detach(), group)
    return divergence
