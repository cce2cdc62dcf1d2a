"""Next-Latent Prediction: lambda_next_token * L_ntp + lambda_hidden * L_h + lambda_kl * L_kl (arXiv 2511.05963).

From every position t the latent predictor rolls d steps forward, fed the true tokens: step i predicts h_{t+i}. The
target state is detached in L_h; in L_kl the teacher and the head's weight are. Gradients do reach the predictor, h_t
and e(x). Ablations let go of the target state or of the head's weight, never of the teacher.

With `objective.detach_base` h_t and e(x) are detached too: the base gets the gradients of `next_token`, by the very
operations of `next_token`, and a predictor is trained on what it is at every step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nextlat_dist.config.entries import resolve
from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.fused_objective import FusedObjective
from nextlat_dist.objective.losses.fused import WeightedTerms
from nextlat_dist.objective.losses.rollout import RolloutLoss
from nextlat_dist.objective.masks import masked_sum, next_token_mask, state_mask, token_mask
from nextlat_dist.objective.output_head import output_head


class NextLatObjective(FusedObjective):
    """ObjectiveInputs, with the embedding -> term sums [1 + 2 * horizon], with the loss where it is fused."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings.config)
        config = settings.config
        self.objective = config.objective
        self.output_layer = output_head(settings)
        self.latent_predictor = resolve(config.predictor.entry.module)(
            settings.transformer_config, config.predictor_hidden_size, settings.process_groups
        )

    def read_directly(self) -> list[nn.Module]:
        return [*super().read_directly(), self.latent_predictor]

    def rollout(self, hidden: torch.Tensor, embedded: torch.Tensor) -> list[torch.Tensor]:
        """Predicted states of steps 1 .. horizon: entry i - 1 is [s - i, b, h], index t holding the prediction of
        h_{t+i}.
        """
        state, predicted = hidden, []
        for step in range(1, self.objective.horizon + 1):
            state = self.latent_predictor(state[:-1], embedded[step:])
            predicted.append(state)
        return predicted

    def in_chunks(self, inputs: ObjectiveInputs) -> torch.Tensor | WeightedTerms:
        assert inputs.embedded is not None
        tied = inputs.tied_weight
        terms = RolloutLoss(
            self.objective,
            partial(self.output_layer.vocabulary_pass, tied),
            self.output_layer.weight_of(tied),
            self.latent_predictor,
            inputs.hidden,
            inputs.embedded,
            inputs.batch,
            self.wanted_weights,
        ).terms()
        if not self.objective.detach_base:
            return terms
        batch = inputs.batch
        return joined(self.cross_entropies(tied, inputs.hidden, batch.targets, [next_token_mask(batch)]), terms)

    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        hidden, batch = inputs.hidden, inputs.batch
        assert inputs.embedded is not None
        if self.objective.detach_base:
            predicted = self.rollout(hidden.detach(), _WithoutGradient.apply(inputs.embedded))
        else:
            predicted = self.rollout(hidden, inputs.embedded)
        # What weighs nothing is only logged: it costs no backward pass, and no NaN of its own reaches the
        # others as 0 * NaN. Only the cross entropy keeps a gradient, of zeros: ZeRO wants one for the head's weight.
        students, reached, target = predicted, predicted, hidden
        if not self.objective.ever_weighs("lambda_kl"):
            students = [state.detach() for state in predicted]
        if not self.objective.ever_weighs("lambda_hidden"):
            reached = [state.detach() for state in predicted]
        if self.objective.stop_gradient_target or not self.objective.ever_weighs("lambda_hidden"):
            target = hidden.detach()
        cross_entropy, divergences = self.output_layer(
            hidden,
            batch.targets,
            students,
            inputs.tied_weight,
            freeze_for_students=self.objective.stop_gradient_head or not self.objective.ever_weighs("lambda_kl"),
        )
        if target.dtype != torch.float64:
            target = target.float()
        hidden_sums, kl_sums = [], []
        for step, (state, divergence) in enumerate(zip(reached, divergences, strict=True), start=1):
            distance = F.smooth_l1_loss(state.to(target.dtype), target[step:], reduction="none").mean(dim=-1)
            hidden_sums.append(masked_sum(distance, state_mask(batch, step)))
            kl_sums.append(masked_sum(divergence, token_mask(batch, step)))
        return torch.stack([masked_sum(cross_entropy, next_token_mask(batch)), *hidden_sums, *kl_sums])


def joined(base: torch.Tensor | WeightedTerms, apart: torch.Tensor | WeightedTerms) -> torch.Tensor | WeightedTerms:
    """The terms of both, the first of `base` and the others of `apart`; both with a loss, or both without."""
    if isinstance(base, WeightedTerms):
        assert isinstance(apart, WeightedTerms)
        return WeightedTerms(base.loss + apart.loss, torch.cat([base.sums, apart.sums[1:]]))
    assert isinstance(apart, torch.Tensor)
    return torch.cat([base, apart[1:]])


class _WithoutGradient(torch.autograd.Function):
    """A tensor as it is, whose gradient is zeros, whatever is made of it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient)
