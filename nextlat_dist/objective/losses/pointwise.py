"""Pointwise work of the fused losses on a block of rows, in place where it can be; pieces that can be compiled.

Each writes nothing but its first argument and what it is given room for.
"""

from __future__ import annotations

import math

import torch

from nextlat_dist.parallel.compiled import piece

# e^FLOOR next to a probability of one is nothing. The logarithm of a student's probability over the teacher's, less its
# mean, is at most -FLOOR + KL; e^CEILING is finite in fp32, so that nothing is cut off below a KL of 35 nats.
FLOOR, CEILING = -50.0, 85.0


@piece
def exponentiate(logits: torch.Tensor, maximum: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """The sum of exp(logits - maximum) of each row [rows]; the exponentials go `into` another tensor."""
    if torch.compiler.is_compiling():  # it goes wrong with `out`, and needs no place for what lies between
        exponentials = torch.exp(logits - maximum[:, None])
        if into is not None:
            into.copy_(exponentials)
        return exponentials.sum(dim=-1)
    return torch.sub(logits, maximum[:, None], out=into).exp_().sum(dim=-1)


@piece
def exponentiate_here(logits: torch.Tensor, maximum: torch.Tensor) -> torch.Tensor:
    """The same in place: a compiler does not see that two arguments are one."""
    return logits.sub_(maximum[:, None]).exp_().sum(dim=-1)


@piece
def normalise(
    logits: torch.Tensor, log_sum_exp: torch.Tensor, exponentials: torch.Tensor | None, share: torch.Tensor
) -> None:
    """Logits to logarithms of probabilities and exponentials, times their `share`, to probabilities, in place."""
    logits.sub_(log_sum_exp[:, None]).clamp_(min=FLOOR)
    if exponentials is not None:
        exponentials.mul_(share[:, None]).clamp_(min=math.exp(FLOOR))


@piece
def mean_log_ratio(
    logits: torch.Tensor, log: torch.Tensor, probabilities: torch.Tensor | None, scratch: torch.Tensor | None
) -> torch.Tensor:
    """A student's logits less the logarithms of q, in place; this rank's summand of their mean under q [rows]."""
    if probabilities is None:
        probabilities = torch.exp(log, out=scratch)
    return torch.linalg.vecdot(probabilities, logits.sub_(log))


@piece
def compare(
    logits: torch.Tensor,
    log: torch.Tensor,
    probabilities: torch.Tensor | None,
    scratch: torch.Tensor | None,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """A student's logits to q expm1(f) in place, f = logits - log q - shift; the mean of f under q and the sum of what
    they became [2, rows].

    `shift`: what `mean_log_ratio` gives, of all ranks, after it has run; None: it is found here. The student's
    probabilities are q e^f over 1 + the sum, whatever the shift is; with this one f is small where the two agree.
    """
    if probabilities is None:
        probabilities = torch.exp(log, out=scratch)
    if shift is None:
        shift = torch.linalg.vecdot(probabilities, logits.sub_(log))
    ratio = logits.sub_(shift[:, None]).clamp_(max=CEILING)
    mean = torch.linalg.vecdot(probabilities, ratio)
    ratio.expm1_().mul_(probabilities)
    return torch.stack([mean, ratio.sum(dim=-1)])
