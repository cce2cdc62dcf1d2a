"""The output head and the losses that read its weight, in two forms.

Called, it gives the loss of every position, with gradients by autograd: for objectives that are not ours, and the
oracle of the other form. `vocabulary_pass` gives what the fused losses of our objectives are made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.objective.losses.fused import VocabularyPass
from nextlat_dist.objective.losses.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_kl,
    vocab_parallel_logits,
)


def output_head(settings: HeadSettings) -> OutputHead:
    """The head of the model of `settings`."""
    model = settings.config.model
    return OutputHead(
        settings.transformer_config,
        model.vocab_size,
        model.padded_vocab_size,
        settings.process_groups,
        model.tie_embeddings,
    )


class OutputHead(nn.Module):
    """softmax(W h) over a vocabulary-parallel W [padded vocab (local), h]; with `tied`, W is the embedding's."""

    def __init__(
        self, transformer_config: Any, vocab_size: int, padded_vocab_size: int, process_groups: Any, tied: bool
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.group = process_groups.tp
        shape = (padded_vocab_size // self.group.size(), transformer_config.hidden_size)
        self.weight = None if tied else nn.Parameter(torch.empty(shape, dtype=transformer_config.params_dtype))

    def forward(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        predicted: list[torch.Tensor],
        tied_weight: torch.Tensor | None = None,
        *,
        freeze_for_students: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Losses in nats, fp32 or wider.

        Args:
            hidden: final hidden states h [s, b, h].
            targets: next tokens [s, b].
            predicted: for rollout step i = 1, 2, …, the predicted state of position t + i at index t, [s - i, b, h].
            tied_weight: the embedding's weight when the head is tied.
            freeze_for_students: no gradient of the divergences reaches the weight.

        Returns:
            Cross entropy [s, b], and for each step KL(p(.|h_{t+i}) || p(.|predicted)) [s - i, b], whose gradient
            reaches `predicted` and, if it is not frozen, the weight through the student's logits: never the teacher.
        """
        weight = self.weight_of(tied_weight)
        logits = vocab_parallel_logits(hidden, weight, self.vocab_size, self.group)
        cross_entropy, log_sum_exp = vocab_parallel_cross_entropy(logits, targets, self.group)
        student_weight = weight.detach() if freeze_for_students else weight
        divergences = []
        for step, state in enumerate(predicted, start=1):
            student = vocab_parallel_logits(state, student_weight, self.vocab_size, self.group)
            divergences.append(vocab_parallel_kl(student, logits[step:], log_sum_exp[step:], self.group))
        return cross_entropy, divergences

    def weight_of(self, tied_weight: torch.Tensor | None) -> torch.Tensor:
        """[vocab (local), h]: the head's own, or the embedding's."""
        weight = self.weight if tied_weight is None else tied_weight
        assert weight is not None
        return weight

    def vocabulary_pass(self, tied_weight: torch.Tensor | None, rows: int, **wanted: Any) -> VocabularyPass:
        """See `losses.fused`; `wanted`: students, gradient, sizes."""
        return VocabularyPass(self.weight_of(tied_weight), self.vocab_size, self.group, rows, **wanted)

    def logits(self, hidden: torch.Tensor, tied_weight: torch.Tensor | None = None) -> torch.Tensor:
        """[s, b, h] -> this rank's logits [s, b, vocab (local)]."""
        return vocab_parallel_logits(hidden, self.weight_of(tied_weight), self.vocab_size, self.group)
