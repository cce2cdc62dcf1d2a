"""The losses of pairs in one loop over chunks, with the gradients of all that they reach.

A document of n tokens has n²/2 pairs, so neither their states nor their logits are ever there at once: a chunk's go
through text head, output head and back before the next chunk's.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from nextlat_dist.config.schema import ObjectiveConfig
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.bst.pairs import Pairs, decoded_places, groups_of_rows, pairs_of
from nextlat_dist.objective.losses.chunks import (
    MakePass,
    only_where,
    rows_that_count,
    safe_scale,
    sizes_on,
    weighted_loss,
)
from nextlat_dist.objective.losses.fused import WeightedTerms, sum_of_states, wide_dtype, with_gradients
from nextlat_dist.objective.losses.rollout import without_hooks
from nextlat_dist.objective.masks import masked_sum

MOST_ROWS = 8192  # at a time: what the text head keeps of them grows with the width of the model


class PairLoss:
    """One pass over a batch: sums of all terms and, if wanted, the gradients of their weighted sum."""

    def __init__(
        self,
        objective: ObjectiveConfig,
        make_pass: MakePass,
        weight: torch.Tensor,
        text_head: nn.Module,
        hidden: torch.Tensor,
        backward: torch.Tensor,
        batch: Batch,
        weights: torch.Tensor | None,
    ) -> None:
        """
        Args:
            make_pass: (rows, students=…, gradient=…, sizes=…) -> `VocabularyPass` over `weight`.
            weight: the head's [vocab (local), h].
            text_head: (f [n, h], b [n, h]) -> [n, 2, h].
            hidden, backward: f of x_0 .. x_{s-1} and b of x_1 .. x_s [s, b, h].
            weights: of the terms [3]; None: no gradient is wanted.
        """
        self.objective, self.batch, self.head = objective, batch, text_head
        self.hidden, self.backward, self.weight = hidden, backward, weight
        self.wide, self.sizes = wide_dtype(hidden.dtype), sizes_on(hidden.device)
        self.weights = None if weights is None else weights.to(self.wide)
        # A small vocabulary leaves room for more rows in the same memory: there are many pairs.
        self.rows = max(self.sizes.chunk, min(MOST_ROWS, self.sizes.block // weight.shape[0]))
        self.run = make_pass(self.rows, students=False, gradient=weights is not None, sizes=self.sizes)
        self.sums = torch.zeros(3, dtype=self.wide, device=hidden.device)
        self.parameters: dict[str, torch.Tensor] = {}
        if weights is not None:
            # Of the chunks' own graph: their gradients are added up here, not where an engine's hooks see them.
            self.parameters = {name: p.detach().requires_grad_() for name, p in text_head.named_parameters()}
            self.gradients = {name: torch.zeros_like(value, dtype=self.wide) for name, value in self.parameters.items()}
            self.of_hidden, self.of_backward = (torch.zeros_like(read, dtype=self.wide) for read in (hidden, backward))

    def terms(self) -> torch.Tensor | WeightedTerms:
        """The sums [3], without gradient if no weights were given, else with the loss."""
        with without_hooks(self.head):
            for rows in groups_of_rows(self.batch):
                for chunk in pairs_of(self.batch, rows, self.objective).split(max(1, self.rows // 2)):
                    self._chunk(chunk)
                self._decoded(rows)
        if self.weights is None:
            return self.sums
        named = dict(self.head.named_parameters())
        gradients: dict[torch.Tensor, torch.Tensor | None] = {
            self.hidden: self.of_hidden,
            self.backward: self.of_backward,
            self.weight: self.run.weight_gradient,
            **{named[name]: gradient for name, gradient in self.gradients.items()},
        }
        return with_gradients(weighted_loss(self.sums, self.weights), self.sums, gradients)

    def _chunk(self, pairs: Pairs) -> None:
        if not len(pairs):
            return
        places = [place * len(self.batch) + pairs.row for place in (pairs.before, pairs.after)]
        before, after = (
            read.detach().flatten(0, 1)[place].requires_grad_(self.weights is not None)
            for read, place in zip((self.hidden, self.backward), places, strict=True)
        )
        with torch.set_grad_enabled(self.weights is not None):
            states = functional_call(self.head, self.parameters, (before, after))
        # Next tokens first, then the previous ones.
        counts = torch.cat([pairs.next_counts, pairs.previous_counts])
        labels = self.batch.labels
        targets = torch.cat([labels[pairs.row, pairs.before + 1], labels[pairs.row, pairs.after]])
        read, rows = states.detach().transpose(0, 1).flatten(0, 1), rows_that_count(counts)
        teacher = self.run.teacher(read[rows], targets[rows])
        losses = torch.zeros(len(counts), dtype=self.wide, device=read.device)
        losses[rows] = teacher.loss
        for term, (loss, mask) in enumerate(zip(losses.chunk(2), counts.chunk(2), strict=True)):
            self.sums[term] += masked_sum(loss, mask)
        if self.weights is None:
            return
        scale = torch.cat([safe_scale(self.weights[term], mask) for term, mask in enumerate(counts.chunk(2))])[rows]
        partial, _ = self.run.gradient(read[rows], teacher, scale)
        (whole,) = sum_of_states([partial], self.run.group)
        gradient = torch.zeros_like(read)
        gradient[rows] = only_where(scale, whole).to(gradient.dtype)
        sources = [before, after, *self.parameters.values()]
        of_before, of_after, *of_parameters = torch.autograd.grad(
            states, sources, gradient.unflatten(0, (2, -1)).transpose(0, 1)
        )
        for total, place, part in zip((self.of_hidden, self.of_backward), places, (of_before, of_after), strict=True):
            total.view(-1, total.shape[-1]).index_add_(0, place, part.to(self.wide))
        for name, part in zip(self.parameters, of_parameters, strict=True):
            self.gradients[name] += part

    @torch.no_grad()
    def _decoded(self, rows: slice) -> None:
        """The next token given the end alone: known and logged, no more."""
        row, at, end = decoded_places(self.batch, rows, self.objective)
        parts = (row, at, end, self.batch.labels[row, at + 1])
        for row, at, end, target in zip(*(part.split(self.rows) for part in parts), strict=True):
            if len(row):
                before, after = self.hidden.detach()[at, row], self.backward.detach()[end, row]
                states = functional_call(self.head, self.parameters, (before, after))
                self.sums[2] += self.run.teacher(states[:, 0], target).loss.sum()
