"""The objective `guess` in training, and what drafts with its layers: one token a cycle, from the state alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nextlat_dist.config.schema import RunConfig
from nextlat_dist.huggingface.drafters.format import DrafterKind, StoredDrafter, Tensors
from nextlat_dist.inference.drafting import Chooser, Drawn, unroll
from nextlat_dist.model.layer_list import HeadSettings
from nextlat_dist.model.rows import ObjectiveInputs
from nextlat_dist.objective.masks import masked_sum, next_token_mask, token_mask
from nextlat_dist.objective.output_head import output_head


class Guess(nn.Module):
    """h + W_out tanh(W_in h), its matrices sharded over tensor ranks: h [s, b, h] -> [s, b, h]."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        size, shared = settings.config.model.hidden_size, settings.transformer_config
        common = {"config": shared, "init_method": shared.init_method, "bias": False}
        common["tp_group"] = settings.process_groups.tp
        self.linear_in = ColumnParallelLinear(size, size, **common)
        self.linear_out = RowParallelLinear(size, size, input_is_parallel=True, skip_bias_add=False, **common)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        guessed: torch.Tensor = hidden + self.linear_out(self.linear_in(hidden)[0].tanh())[0]
        return guessed


class GuessObjective(nn.Module):
    """ObjectiveInputs -> term sums [2]."""

    canonical_prefix = ""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.output_layer = output_head(settings)
        self.guess = Guess(settings)

    def forward(self, inputs: ObjectiveInputs) -> torch.Tensor:
        hidden, batch = inputs.hidden, inputs.batch
        states = torch.cat([hidden, self.guess(hidden)[:-1]])
        targets = torch.cat([batch.targets, batch.targets[1:]])
        losses, _ = self.output_layer(states, targets, [], inputs.tied_weight)
        now, ahead = losses.split([len(hidden), len(hidden) - 1])
        return torch.stack([masked_sum(now, next_token_mask(batch)), masked_sum(ahead, token_mask(batch, 1))])


@dataclass(frozen=True)
class GuessConfig:
    hidden_size: int
    vocab_size: int
    base_weights_sha256: str


def from_checkpoint(canonical: Tensors, config: RunConfig, base_sha256: str) -> tuple[GuessConfig, Tensors]:
    weights = {n.removeprefix("guess."): t for n, t in canonical.items() if n.startswith("guess.")}
    return GuessConfig(config.model.hidden_size, config.model.vocab_size, base_sha256), weights


class GuessDrafter:
    longest = 1
    vocabulary = None

    def __init__(self, stored: StoredDrafter, llama: Any, graphs: Any) -> None:
        self.llama = llama
        self.into, self.out = (stored.weights[f"linear_{n}.weight"].to(llama.embedding) for n in ("in", "out"))

    def start(self, rows: int, capacity: int) -> "GuessMemory":
        return GuessMemory(self)


class GuessMemory:
    def __init__(self, drafter: GuessDrafter) -> None:
        self.drafter, self.h = drafter, torch.empty(0)

    def observe(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        pass

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        self.h = h

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        h, drafter = self.h if kept is None else self.h[kept], self.drafter
        logits: torch.Tensor = drafter.llama.logits(h + (h @ drafter.into.t()).tanh() @ drafter.out.t())
        return logits

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        return unroll(self, chooser, h, tokens, uniforms, confidences)

    def move(self, source: int, target: int) -> None:
        pass


KIND = DrafterKind(
    name="guess",
    algorithm="guess",
    architecture="Guess",
    config=GuessConfig,
    tensor_names=lambda config: ("linear_in.weight", "linear_out.weight"),
    from_checkpoint="toy_guess:from_checkpoint",
    drafter="toy_guess:GuessDrafter",
    speculative_tokens=lambda config: 1,
)
