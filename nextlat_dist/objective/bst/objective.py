"""The Belief State Transformer: (CE_next + CE_previous) / 2 over pairs of one document (Hu et al. 2025, arXiv
2410.23506).

Two stacks read a document from both sides: f_t has read what is up to x_t, b_j what is from x_j on. From every pair
(t, j), t < j, the text head predicts x_{t+1} and x_{j-1}, through one output head. Decoding has b of the end token
alone, which is a constant. `decoded`, logged without weight, is the loss of the next token under that condition: what
compares with the `next_token` of other objectives.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from nextlat_dist.config.schema import swiglu_ffn_hidden_size
from nextlat_dist.model.layer_list import EMBEDDING_KEY, HeadSettings, LayerEntry
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.bst.backward_stack import (
    BackwardLayer,
    BackwardNorm,
    embed_backward,
    layer_backward,
    norm_backward,
)
from nextlat_dist.objective.bst.pair_loss import PairLoss
from nextlat_dist.objective.bst.pairs import decoded_places, groups_of_rows, pairs_of
from nextlat_dist.objective.bst.text_head import TextHead
from nextlat_dist.objective.fused_objective import FusedObjective
from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.output_head import output_head


def backward_stack(settings: HeadSettings, embedding: LayerEntry) -> list[LayerEntry]:
    """The entries of the second stack; `embedding`: the list's own, tied."""
    model = settings.config.model
    norm = {
        "normalized_shape": model.hidden_size,
        "eps": model.norm_epsilon,
        "dtype": settings.transformer_config.params_dtype,
        "gathered_over": settings.sequence_group,
    }
    return [
        LayerEntry(embedding.cls, embedding.arguments, EMBEDDING_KEY, embed_backward),
        *(
            LayerEntry(BackwardLayer, {"layer_index": index, **settings.decoder_layer}, None, layer_backward)
            for index in range(model.num_layers)
        ),
        LayerEntry(BackwardNorm, norm, None, norm_backward),
    ]


class BSTObjective(FusedObjective):
    """ObjectiveInputs, with the states of the second stack -> term sums [3], with the loss where it is fused."""

    def __init__(self, settings: HeadSettings) -> None:
        config = settings.config
        super().__init__(config)
        model, dtype = config.model, settings.transformer_config.params_dtype
        self.objective = config.objective
        self.output_layer = output_head(settings)
        inner = swiglu_ffn_hidden_size(2 * model.hidden_size)
        self.text_head = TextHead(model.hidden_size, inner, model.norm_epsilon, dtype, settings.process_groups.tp)

    def read_directly(self) -> list[nn.Module]:
        return [*super().read_directly(), self.text_head]

    def in_chunks(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        assert inputs.backward is not None
        tied = inputs.tied_weight
        return PairLoss(
            self.objective,
            partial(self.output_layer.vocabulary_pass, tied),
            self.output_layer.weight_of(tied),
            self.text_head,
            inputs.hidden,
            inputs.backward,
            inputs.batch,
            self.wanted_weights,
        ).terms()

    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        hidden, backward, batch = inputs.hidden, inputs.backward, inputs.batch
        assert backward is not None
        sums: list[Any] = [0, 0, 0]
        for rows in groups_of_rows(batch):
            pairs, labels = pairs_of(batch, rows, self.objective), batch.labels
            states = self.text_head(hidden[pairs.before, pairs.row], backward[pairs.after, pairs.row])
            for term, (place, counts) in enumerate(
                ((pairs.before + 1, pairs.next_counts), (pairs.after, pairs.previous_counts))
            ):
                wanted = labels[pairs.row[counts], place[counts]]
                found = self._cross_entropy(states[counts, term], wanted, inputs.tied_weight)
                sums[term] = sums[term] + found
            row, at, end = decoded_places(batch, rows, self.objective)
            with torch.no_grad():
                states = self.text_head(hidden[at, row], backward[end, row])
                sums[2] = sums[2] + self._cross_entropy(states[:, 0], labels[row, at + 1], inputs.tied_weight)
        return torch.stack(sums)

    def _cross_entropy(
        self, states: torch.Tensor, targets: torch.Tensor, tied_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """The sum over states [n, h]."""
        losses, _ = self.output_layer(states[:, None], targets[:, None], [], tied_weight)
        return losses.sum()

    def next_token_states(self, inputs: ObjectiveInputs, condition: torch.Tensor) -> torch.Tensor:
        """What the head reads of the next token [s, b, h], given b [h] of the end token alone."""
        hidden = inputs.hidden.flatten(0, 1)
        states: torch.Tensor = self.text_head(hidden, condition.expand_as(hidden))
        return states[:, 0].view_as(inputs.hidden)
