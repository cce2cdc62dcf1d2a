"""Cross entropy and KL over chunks of rows, their gradients formed in the forward pass.

A chunk's logits are made, turned into losses, and multiplied back into gradients before the next chunk's; so what is
alive is two or three [chunk, vocab (local)] tensors, however long the batch and the horizon. The teacher's distribution
is made once per chunk: it serves the cross entropy and the KL of every horizon whose target lies in the chunk.

Gradients can be formed at once only if what they are scaled with is known. So the weights of the loss terms come before
the forward pass (`term_weights`), and the objective returns the loss next to the term sums. `vocab_parallel` has the
same losses on whole logits, with gradients by autograd: the test oracle, and the way of objectives that are not ours.

Numerics, fp32 (fp64 for fp64 weights) whatever the weights are in:
- With q the teacher's probabilities, p the student's and f = log(p / q), the gradient p - q is q expm1(f): subtracted
  before anything is rounded to the weights' precision, so it keeps its digits where student and teacher agree.
- KL is -mean(f) + log(1 + mean(expm1(f))), the means under q, also for f less any number; see
  `vocab_parallel._KullbackLeibler`. So a student's log-sum-exp is never made: f less its mean will do.
- The teacher's log-probability is at least `pointwise.FLOOR`: expm1(f) could overflow where the teacher has next to
  nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from nextlat_dist.objective.losses.pointwise import compare, exponentiate, exponentiate_here, mean_log_ratio, normalise
from nextlat_dist.parallel.compiled import compiling


@dataclass(frozen=True)
class Sizes:
    """Rows at a time on a kind of device.

    Attributes:
        chunk: rows of a matrix product.
        block: elements of pointwise work, at least a row: its temporary tensors should stay in the cache of a CPU.
        keep: keep the teacher's probabilities of a chunk instead of taking them from their logarithms at every horizon:
            memory for time.
    """

    chunk: int
    block: int
    keep: bool


ON_CPU = Sizes(chunk=256, block=200_000, keep=True)
ON_ACCELERATOR = Sizes(chunk=1024, block=6_400_000, keep=False)


class WeightedTerms(NamedTuple):
    """What an objective returns that was given the weights of its terms.

    Attributes:
        loss: scalar, the weighted sum, which alone carries the gradient.
        sums: [terms].
    """

    loss: torch.Tensor
    sums: torch.Tensor


class _GradientsFromForward(torch.autograd.Function):
    """(loss, sums) as they are; backward hands over gradients that are there already, scaled."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, sums: torch.Tensor, gradients: list[torch.Tensor | None], *sources: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.gradients = gradients
        ctx.dtypes = [source.dtype for source in sources]
        sums = sums.clone()
        ctx.mark_non_differentiable(sums)
        return loss.clone(), sums

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        assert ctx.gradients is not None, "these gradients were handed over; run the forward pass again"
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(grad_loss).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, None, None, *scaled


def with_gradients(
    loss: torch.Tensor, sums: torch.Tensor, gradients: dict[torch.Tensor, torch.Tensor | None]
) -> WeightedTerms:
    """`loss`, whose backward pass adds to each key of `gradients` its value times the gradient of the loss, once.

    The values may be wider than their keys; they are overwritten.
    """
    return WeightedTerms(*_GradientsFromForward.apply(loss, sums, list(gradients.values()), *gradients))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and gradients are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class Teacher:
    """Distributions over the rows of a chunk.

    Attributes:
        loss: cross entropy of each row [rows].
        log: their logarithms [rows, real vocab (local)], at least `pointwise.FLOOR`, for students; else spent.
        kept: the probabilities, of the same shape, where they are kept; without students times `total`.
        total: of each row's `kept` [rows]; None: they are probabilities.
    """

    loss: torch.Tensor
    log: torch.Tensor
    kept: torch.Tensor | None
    total: torch.Tensor | None
    index: torch.Tensor  # of each row's target among this rank's columns, 0 where it is not here [rows, 1]
    here: torch.Tensor  # whether it is here [rows]


class Student(NamedTuple):
    """What `VocabularyPass.student` returns.

    Attributes:
        divergence: KL(teacher || student) of each row, in nats [rows].
        gradient: this rank's summand of the gradient of each row's state [rows, h], but for `excess`; None where none
            was asked for.
        excess: the student's probabilities times its `1 + excess` are what `gradient` was made from [rows].
    """

    divergence: torch.Tensor
    gradient: torch.Tensor | None
    excess: torch.Tensor


class VocabularyPass:
    """An output head in one pass over the rows of a batch: products, buffers, the gradient of its weight.

    Attributes:
        weight_gradient: [vocab (local), h] in fp32 or wider; None where none was asked for.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup,
        rows: int,
        *,
        sizes: Sizes,
        students: bool,
        gradient: bool,
    ) -> None:
        """
        Args:
            weight: [vocab (local), h].
            vocab_size: of the whole vocabulary, without padding.
            rows: at most so many at a time.
            students: `student` will be called.
            gradient: of the weight is wanted.
        """
        self.group, self.sizes = group, sizes
        self.wide = wide_dtype(weight.dtype)
        local = weight.shape[0]
        self._first = group.rank() * local
        self._real = min(max(vocab_size - self._first, 0), local)  # columns that are no padding
        # A product of bf16 matrices with an fp32 result is there on accelerators alone.
        self._mixed = weight.dtype != self.wide and weight.device.type != "cpu"
        self._weight = (weight.detach() if self._mixed else weight.detach().to(self.wide))[: self._real]
        self.weight_gradient = torch.zeros_like(weight, dtype=self.wide) if gradient else None
        self._log = self._buffer(rows)
        self._students = self._buffer(rows) if students else None
        self._kept = self._buffer(rows) if students and sizes.keep else None
        # What is compiled needs no room of its own, and no blocks.
        self._block = rows if compiling() else max(1, sizes.block // max(self._real, 1))
        self._scratch = [] if compiling() else [self._buffer(min(self._block, rows))]

    def teacher(self, states: torch.Tensor, targets: torch.Tensor) -> Teacher:
        """The distributions of states [rows, h], and their cross entropy with targets [rows], global token ids."""
        log = self._product(states, self._weight.t(), out=self._log[: len(states)])
        kept = None if self._kept is None else self._kept[: len(states)]
        index = targets - self._first
        here = (index >= 0) & (index < self._real)
        index = torch.where(here, index, 0)[:, None]
        target = log.gather(1, index)[:, 0] if self._real else torch.zeros_like(targets, dtype=self.wide)
        own = torch.where(here, target, 0)
        if self._students is None:
            maximum, total, own = self._sum_exp(log, own, exponentials=log)
            return Teacher(maximum + total.log() - own, log, log, total, index, here)
        maximum, total, own = self._sum_exp(log, own, exponentials=kept)
        log_sum_exp, share = maximum + total.log(), 1 / total
        for block in self._blocks(len(states)):
            normalise(log[block], log_sum_exp[block], None if kept is None else kept[block], share[block])
        return Teacher(log_sum_exp - own, log, kept, None, index, here)

    def student(
        self,
        states: torch.Tensor,
        teacher: Teacher,
        rows: slice | torch.Tensor,
        scale: torch.Tensor | None,
        *,
        frozen: bool = True,
    ) -> Student:
        """KL of states [rows, h] from these rows of the teacher, a slice or indices.

        Args:
            scale: of each row's divergence in the loss; None: no gradient is wanted.
            frozen: the gradient does not reach the weight.
        """
        assert self._students is not None
        logits = self._product(states, self._weight.t(), out=self._students[: len(states)])
        sums = torch.zeros(2, len(states), dtype=self.wide, device=logits.device)
        shift = None
        if self.group.size() > 1:
            shift = torch.zeros(len(states), dtype=self.wide, device=logits.device)
            for block, log, kept, scratch in self._taught(teacher, rows, len(states)):
                shift[block] = mean_log_ratio(logits[block], log, kept, scratch)
            _sum_over_ranks(shift, self.group)
        for block, log, kept, scratch in self._taught(teacher, rows, len(states)):
            sums[:, block] = compare(logits[block], log, kept, scratch, None if shift is None else shift[block])
        mean, excess = _sum_over_ranks(sums, self.group)
        divergence = torch.log1p(excess) - mean
        if scale is None:
            return Student(divergence, None, excess)
        factor = (scale / (1 + excess))[:, None]
        if not frozen and self.weight_gradient is not None:
            for block, log, kept, _ in self._taught(teacher, rows, len(states)):
                logits[block].addcmul_(log.exp() if kept is None else kept, excess[block, None], value=-1)
            excess = torch.zeros_like(excess)
            self._add_to_weight(logits, states * factor)
        return Student(divergence, self._product(logits, self._weight) * factor, excess)

    def _taught(
        self, teacher: Teacher, rows: slice | torch.Tensor, count: int
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None, torch.Tensor | None]]:
        """Blocks of `count` students: where, the teacher's logarithms, its probabilities or room for them."""
        for block in self._blocks(count):
            part = slice(rows.start + block.start, rows.start + block.stop) if isinstance(rows, slice) else rows[block]
            kept = None if teacher.kept is None else teacher.kept[part]
            scratch = self._scratch[0][: block.stop - block.start] if self._scratch else None
            yield block, teacher.log[part], kept, scratch

    def gradient(
        self, states: torch.Tensor, teacher: Teacher, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last call for a chunk: the gradient of its cross entropy, which the weight's gets added.

        Args:
            scale: of each row's loss; 0 where it does not count [rows].

        Returns:
            This rank's summands of the states' gradient [rows, h], and of the mean row of the weight under each
            distribution [rows, h], which `Student.gradient` lacks.
        """
        probabilities = teacher.log.exp_() if teacher.kept is None else teacher.kept
        own = teacher.here.to(self.wide)[:, None]
        if self._real:
            one = own if teacher.total is None else own * teacher.total[:, None]
            probabilities.scatter_add_(1, teacher.index, -one)
        difference, of_weight = self._product(probabilities, self._weight), scale
        if teacher.total is not None:
            difference, of_weight = difference / teacher.total[:, None], scale / teacher.total
        if self.weight_gradient is not None:
            self._add_to_weight(probabilities, states * of_weight[:, None])
        target = self._weight[teacher.index[:, 0]] * own if self._real else torch.zeros_like(difference)
        return difference * scale[:, None], difference + target

    def _add_to_weight(self, differences: torch.Tensor, states: torch.Tensor) -> None:
        """Add differences^T states, [rows, real vocab (local)]^T [rows, h]."""
        assert self.weight_gradient is not None
        total = self.weight_gradient[: self._real]
        if self._mixed:
            dtype = self._weight.dtype
            torch.addmm(total, differences.t().to(dtype), states.to(dtype), out_dtype=self.wide, out=total)
        else:
            total.addmm_(differences.t(), states.to(self.wide))

    def _sum_exp(
        self, logits: torch.Tensor, summed: torch.Tensor, exponentials: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Over the whole vocabulary: the maximum and sum exp(logits - maximum) of each row [rows]; and `summed`.

        Args:
            summed: [rows], summed over the ranks, which travels along.
            exponentials: is filled with exp(logits - maximum); may be `logits`.
        """
        rows, alone = len(logits), self.group.size() == 1
        maximum = torch.full((rows,), -math.inf, dtype=self.wide, device=logits.device)
        if not alone:
            if self._real:
                torch.amax(logits, dim=-1, out=maximum)
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
        sums = torch.zeros(2, rows, dtype=self.wide, device=logits.device)
        for block in self._blocks(rows):
            if alone:
                torch.amax(logits[block], dim=-1, out=maximum[block])
            if exponentials is logits:
                sums[0, block] = exponentiate_here(logits[block], maximum[block])
                continue
            into = exponentials
            if into is not None:
                into = into[block]
            elif self._scratch:
                into = self._scratch[0][: block.stop - block.start]
            sums[0, block] = exponentiate(logits[block], maximum[block], into)
        sums[1] = summed
        total, summed = _sum_over_ranks(sums, self.group)
        return maximum, total, summed

    def _buffer(self, rows: int) -> torch.Tensor:
        return torch.empty(rows, self._real, dtype=self.wide, device=self._weight.device)

    def _blocks(self, rows: int) -> Iterator[slice]:
        block = self._block
        return (slice(start, min(start + block, rows)) for start in range(0, rows, block))

    def _product(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """left @ right in fp32 or wider, of operands in the weight's precision where the device can do that."""
        if self._mixed:
            return torch.mm(left.to(right.dtype), right, out_dtype=self.wide, out=out)
        return torch.mm(left.to(self.wide), right, out=out)


def sum_of_states(parts: list[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's summands of several gradients [rows, h], summed in one collective."""
    if group.size() == 1 or not parts:
        return parts
    total = torch.cat(parts)
    dist.all_reduce(total, group=group)
    return list(total.split([len(part) for part in parts]))


def _sum_over_ranks(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    if group.size() > 1:
        dist.all_reduce(values, group=group)
    return values
