"""The latent rollout and its losses in one loop over chunks of positions, with the gradients of all that they reach.

Positions of a rollout are independent: what a chunk needs besides its own positions are the `horizon` after it, whose
tokens it is fed and whose states it is compared with. So neither the rollout's states nor its activations are ever
there for the whole batch; a chunk's backward pass through the predictor runs before the next chunk begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.losses.chunks import (
    MakePass,
    only_where,
    rows_that_count,
    safe_scale,
    sizes_on,
    weighted_loss,
)
from nextlat_dist.objective.losses.fused import (
    Student,
    Teacher,
    WeightedTerms,
    sum_of_states,
    wide_dtype,
    with_gradients,
)
from nextlat_dist.objective.masks import masked_sum, next_token_mask, state_mask, token_mask

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


@dataclass(frozen=True)
class Positions:
    """The positions of a batch that a rollout passes, row by row of the batch: all that are no padding, on a CPU.

    Attributes:
        index: of each in a [s * b] tensor [positions].
        targets: [positions] global token ids.
        next_token: whether the cross entropy counts [positions].
        hidden, kl: whether the pair of each position and step i counts, at i - 1 [horizon, positions].
    """

    index: torch.Tensor
    targets: torch.Tensor
    next_token: torch.Tensor
    hidden: torch.Tensor
    kl: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, horizon: int) -> Positions:
        documents = batch.input_documents
        rows, length = documents.shape
        kept = rows_that_count((documents >= 0).reshape(-1))
        steps = range(1, horizon + 1)
        return cls(
            (kept % length) * rows + kept // length,
            batch.targets.t().reshape(-1)[kept],
            _by_row(next_token_mask(batch), length)[kept],
            torch.stack([_by_row(state_mask(batch, step), length)[kept] for step in steps]),
            torch.stack([_by_row(token_mask(batch, step), length)[kept] for step in steps]),
        )

    def __len__(self) -> int:
        return len(self.index)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def _by_row(mask: torch.Tensor, length: int) -> torch.Tensor:
    """[s - step, b] -> [b * s], False where there is no such position."""
    return F.pad(mask, (0, 0, 0, length - len(mask))).t().reshape(-1)


@dataclass(frozen=True)
class _Pairs:
    """The students of one step in a chunk: where their rollouts begin, and which rows of the teacher they have."""

    found: Student
    begins: torch.Tensor
    taught: slice | torch.Tensor
    scale: torch.Tensor | None

    def gradient(self, mean_row: torch.Tensor) -> torch.Tensor:
        """This rank's summand [pairs, h]; of nothing where the KL is only logged."""
        found = self.found
        if self.scale is None or found.gradient is None:
            return mean_row[:0]
        factor = self.scale * found.excess / (1 + found.excess)
        return found.gradient.sub_(factor[:, None] * mean_row[self.taught])  # in place: there are `horizon` of them


class Rollout(nn.Module):
    """The predictor over the positions of a chunk, with what it takes from a token taken once for all steps, where the
    predictor has `read` and `step`.
    """

    def __init__(self, predictor: nn.Module, recompute: bool) -> None:
        """`recompute`: the backward pass finds what matrix products made; what is pointwise it computes again."""
        super().__init__()
        self.predictor, self.recompute = predictor, recompute

    def forward(self, states: torch.Tensor, embedded: torch.Tensor, count: int, horizon: int) -> list[torch.Tensor]:
        """States and embedded tokens [positions, h], of which rollouts begin at the first `count` -> predicted states
        of each step [those that have such a target, h].
        """
        fed, step = self._fed(embedded[:, None])
        predicted, state = [], states[:count, None]
        for number in range(1, horizon + 1):
            length = min(count, len(states) - number)
            if length <= 0:
                break
            inputs = state[:length], *(part[number : number + length] for part in fed)
            if self.recompute and torch.is_grad_enabled():
                contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
                state = checkpoint(step, *inputs, use_reentrant=False, context_fn=contexts)
            else:
                state = step(*inputs)
            predicted.append(state[:, 0])
        return predicted

    def _fed(self, embedded: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Callable[..., torch.Tensor]]:
        """What a step takes from the tokens, by position, and the step: (state, *parts of it) -> state."""
        read, step = getattr(self.predictor, "read", None), getattr(self.predictor, "step", None)
        if read is None or step is None:
            return (embedded,), self.predictor
        fed, shared = read(embedded)
        return fed, lambda state, *parts: step(state, type(fed)(*parts), shared)


class RolloutLoss:
    """One pass over a batch: sums of all terms and, if wanted, the gradients of their weighted sum.

    With `objective.detach_base` the cross entropy is somebody else's: its sum is 0 here, and only the predictor's
    parameters get gradients.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        make_pass: MakePass,
        weight: torch.Tensor,
        predictor: nn.Module,
        hidden: torch.Tensor,
        embedded: torch.Tensor,
        batch: Batch,
        weights: torch.Tensor | None,
    ) -> None:
        """
        Args:
            make_pass: (rows, students=…, gradient=…, sizes=…) -> `VocabularyPass` over `weight`.
            weight: the head's [vocab (local), h].
            predictor: (h [n, 1, h], e(x) [n, 1, h]) -> next h [n, 1, h], each position by itself.
            hidden, embedded: [s, b, h].
            weights: of the terms [1 + 2 horizon]; None: no gradient is wanted.
        """
        self.objective, self.horizon = objective, objective.horizon
        self.weight, self.rollout = weight, Rollout(predictor, recompute=not sizes_on(hidden.device).keep)
        self.hidden, self.embedded = hidden, embedded
        self.wide, self.sizes = wide_dtype(hidden.dtype), sizes_on(hidden.device)
        self.weights = None if weights is None else weights.to(self.wide)
        self.positions = Positions.of(batch, self.horizon)
        rows = min(self.sizes.chunk, max(len(self.positions), 1)) + self.horizon
        self.alone = objective.detach_base
        of_weight = weights is not None and not self.alone
        self.run = make_pass(rows, students=True, gradient=of_weight, sizes=self.sizes)
        self.sums = torch.zeros(1 + 2 * self.horizon, dtype=self.wide, device=hidden.device)
        self.parameters: dict[str, torch.Tensor] = {}
        if weights is not None:
            # Of the chunks' own graph: their gradients are added up here, not where an engine's hooks see them.
            self.parameters = {name: p.detach().requires_grad_() for name, p in self.rollout.named_parameters()}
            self.gradients = {name: torch.zeros_like(value, dtype=self.wide) for name, value in self.parameters.items()}
            self.state_gradient, self.embedding_gradient = _zeros(hidden), _zeros(embedded)

    def terms(self) -> torch.Tensor | WeightedTerms:
        """The sums [1 + 2 horizon], without gradient if no weights were given, else with the loss."""
        with without_hooks(self.rollout):
            for start in range(0, len(self.positions), self.sizes.chunk):
                self._chunk(start, min(start + self.sizes.chunk, len(self.positions)))
        if self.weights is None:
            return self.sums
        gradients: dict[torch.Tensor, torch.Tensor | None] = {}
        if self.alone and self.embedded.requires_grad:
            gradients = {self.embedded: self.embedding_gradient}  # zeros, for whoever waits for one
        elif not self.alone:
            gradients = {
                self.hidden: self.state_gradient,
                self.embedded: self.embedding_gradient,
                self.weight: self.run.weight_gradient,
            }
        named = dict(self.rollout.named_parameters())
        gradients |= {named[name]: gradient for name, gradient in self.gradients.items()}
        return with_gradients(weighted_loss(self.sums, self.weights), self.sums, gradients)

    def _chunk(self, start: int, end: int) -> None:
        """The cross entropy of positions start .. end, and the rollouts that begin there."""
        positions, count = self.positions, end - start
        reach = slice(start, min(end + self.horizon, len(positions)))
        index = positions.index[reach]
        states, embedded = (self._read(source, index) for source in (self.hidden, self.embedded))
        # The rows that teach: the target of every pair that counts for the KL counts for the cross entropy too.
        rows = rows_that_count(positions.next_token[reach])
        own = int((rows < count).sum()) if rows.device.type == "cpu" else count
        counted = positions.next_token[reach][rows]
        teacher = self.run.teacher(states.detach()[rows], positions.targets[reach][rows])
        if not self.alone:
            self.sums[0] += masked_sum(teacher.loss[:own], counted[:own])
        with torch.set_grad_enabled(self.weights is not None):
            predicted, distance = self._rollout(states, embedded, start, count)
        students = [self._student(step, state, teacher, rows, start) for step, state in enumerate(predicted, start=1)]
        if self.weights is None:
            return
        scale = safe_scale(self.weights[0], counted)
        scale[own:] = 0  # they are the next chunk's
        of_teacher, mean_row = self.run.gradient(states.detach()[rows], teacher, scale)
        parts = [of_teacher[: 0 if self.alone else own], *(pair.gradient(mean_row) for pair in students)]
        of_teacher, *of_students = sum_of_states(parts, self.run.group)
        if not self.alone:
            self._add(self.state_gradient, index[rows[:own]], only_where(scale[:own], of_teacher))
        places = [(pair.begins, pair.scale) for pair in students]
        del parts, students, of_teacher, mean_row  # as long as the horizon; the rollout's backward pass needs the space
        self._through_rollout(states, embedded, index, predicted, distance, places, of_students)

    def _rollout(
        self, states: torch.Tensor, embedded: torch.Tensor, start: int, count: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Predicted states of each step [positions with such a target, h], and the weighted distance from them."""
        predicted = functional_call(self.rollout, self.parameters, (states, embedded, count, self.horizon))
        total = torch.zeros((), dtype=self.wide, device=states.device)
        target = states.detach() if self.objective.stop_gradient_target else states
        target = target.to(self.wide)
        for step, state in enumerate(predicted, start=1):
            length = len(state)
            distance = F.smooth_l1_loss(state.to(self.wide), target[step : step + length], reduction="none").mean(
                dim=-1
            )
            distance = masked_sum(distance, self.positions.hidden[step - 1, start : start + length])
            self.sums[step] += distance.detach()
            if self.weights is not None and self.objective.ever_weighs("lambda_hidden"):
                total = total + distance * self.weights[step]
        return predicted, total

    def _student(self, step: int, state: torch.Tensor, teacher: Teacher, rows: torch.Tensor, start: int) -> _Pairs:
        """The KL of the pairs whose targets are among the teacher's rows."""
        first, last = step, step + len(state)
        if rows.device.type == "cpu":
            first, last = (int(torch.searchsorted(rows, place)) for place in (first, last))
        taught: slice | torch.Tensor = slice(first, last)
        begins = rows[first:last] - step
        mask = self.positions.kl[step - 1][start + begins]
        if rows.device.type == "cpu" and not mask.all():
            kept = mask.nonzero()[:, 0]
            taught, begins, mask = first + kept, begins[kept], mask[kept]
        factor = step + self.horizon
        scale = None
        if self.weights is not None and self.objective.ever_weighs("lambda_kl"):
            scale = safe_scale(self.weights[factor], mask)
        found = self.run.student(
            state.detach()[begins], teacher, taught, scale, frozen=self.objective.stop_gradient_head
        )
        self.sums[factor] += masked_sum(found.divergence, mask)
        return _Pairs(found, begins, taught, scale)

    def _through_rollout(
        self,
        states: torch.Tensor,
        embedded: torch.Tensor,
        index: torch.Tensor,
        predicted: list[torch.Tensor],
        distance: torch.Tensor,
        places: list[tuple[torch.Tensor, torch.Tensor | None]],
        of_students: list[torch.Tensor],
    ) -> None:
        """The chunk's backward pass through the predictor. `places`: of each student's gradient, and their scale."""
        outputs, gradients = [], []
        if distance.requires_grad:
            outputs.append(distance)
            gradients.append(torch.ones_like(distance))
        for state, (begins, scale) in zip(predicted, places, strict=True):
            part = of_students.pop(0)
            if scale is None:
                continue
            outputs.append(state)
            whole = torch.zeros_like(state)
            whole[begins] = only_where(scale, part).to(whole.dtype)
            gradients.append(whole)
        if not outputs:
            return
        read = [] if self.alone else [(self.state_gradient, states), (self.embedding_gradient, embedded)]
        sources = [*(source for _, source in read), *self.parameters.values()]
        found = list(torch.autograd.grad(outputs, sources, gradients, allow_unused=True))
        of_parameters = found[len(read) :]
        for (total, _), part in zip(read, found, strict=False):
            if part is not None:
                self._add(total, index, part)
        for name, part in zip(self.parameters, of_parameters, strict=True):
            if part is not None:
                self.gradients[name] += part

    def _add(self, total: torch.Tensor, index: torch.Tensor, part: torch.Tensor) -> None:
        """Add to these positions of a [s, b, h]; each occurs once."""
        flat = total.view(-1, total.shape[-1])
        flat[index] = (flat[index] + part).to(flat.dtype)

    def _read(self, source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """[s, b, h] at these positions [n, h], a leaf of the chunk's own graph."""
        read = source.detach().flatten(0, 1)[index]
        return read.requires_grad_(self.weights is not None and not self.alone)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, `module` and what is in it can be called without what others hung on the call.

    ZeRO-3 gathers and releases weights there; `functional_call` brings its own.
    """
    before = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    for part, *_ in before:
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, after_call, before_call in before:
            part._forward_hooks, part._forward_pre_hooks = after_call, before_call
