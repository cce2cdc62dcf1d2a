"""Next-Latent Prediction: lambda_next_token * L_ntp + lambda_hidden * L_h + lambda_kl * L_kl (arXiv 2511.05963).

From every position t the latent predictor rolls d steps forward, fed the true tokens: step i predicts h_{t+i}. The
target state is detached in L_h; in L_kl the teacher and the head's weight are. Gradients do reach the predictor, h_t
and e(x). Ablations let go of the target state or of the head's weight, never of the teacher.
"""

from __future__ import annotations

from functools import partial

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
        super().__init__(settings.config.training.fused_losses)
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
        return RolloutLoss(
            self.objective,
            partial(self.output_layer.vocabulary_pass, tied),
            self.output_layer.weight_of(tied),
            self.latent_predictor,
            inputs.hidden,
            inputs.embedded,
            inputs.batch,
            self.wanted_weights,
        ).terms()

    def whole(self, inputs: ObjectiveInputs) -> torch.Tensor:
        hidden, batch = inputs.hidden, inputs.batch
        assert inputs.embedded is not None
        predicted = self.rollout(hidden, inputs.embedded)
        # What weighs nothing is only logged: it costs no backward pass, and no NaN of its own reaches the
        # others as 0 * NaN. Only the cross entropy keeps a gradient, of zeros: ZeRO wants one for the head's weight.
        students, reached, target = predicted, predicted, hidden
        if self.objective.lambda_kl == 0:
            students = [state.detach() for state in predicted]
        if self.objective.lambda_hidden == 0:
            reached = [state.detach() for state in predicted]
        if self.objective.stop_gradient_target or self.objective.lambda_hidden == 0:
            target = hidden.detach()
        cross_entropy, divergences = self.output_layer(
            hidden,
            batch.targets,
            students,
            inputs.tied_weight,
            freeze_for_students=self.objective.stop_gradient_head or self.objective.lambda_kl == 0,
        )
        if target.dtype != torch.float64:
            target = target.float()
        hidden_sums, kl_sums = [], []
        for step, (state, divergence) in enumerate(zip(reached, divergences, strict=True), start=1):
            distance = F.smooth_l1_loss(state.to(target.dtype), target[step:], reduction="none").mean(dim=-1)
            hidden_sums.append(masked_sum(distance, state_mask(batch, step)))
            kl_sums.append(masked_sum(divergence, token_mask(batch, step)))
        return torch.stack([masked_sum(cross_entropy, next_token_mask(batch)), *hidden_sums, *kl_sums])
