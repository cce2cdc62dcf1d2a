"""Drafts from the latent predictor: roll the hidden state forward without running the transformer.

A cycle starts from a *verified* h_t and a token x_{t+1} that is already part of the output:
`ĥ_{t+1} = p_ψ(h_t, x_{t+1})`, `x̂_{t+2} ~ softmax(W ĥ_{t+1})`, `ĥ_{t+2} = p_ψ(ĥ_{t+1}, x̂_{t+2})`, and so on. No drafted
state outlives its cycle, so a wrong predictor costs speed and never changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from nextlat_dist.export.layout import PredictorConfig
from nextlat_dist.inference.linear import linear
from nextlat_dist.inference.llama import Llama
from nextlat_dist.inference.sampling import Sampling, draw


@dataclass(frozen=True)
class Draft:
    """Drafted token ids, and the distribution that each was drawn from, [k, vocab] (None when greedy or empty)."""

    tokens: list[int]
    probabilities: torch.Tensor | None


class LatentPredictor:
    """`p_ψ(h, x) = h + MLP(LayerNorm([h, e(x)]))` with the base model's own embedding e and output head."""

    def __init__(self, config: PredictorConfig, weights: dict[str, torch.Tensor], llama: Llama) -> None:
        """`weights` as in `export.layout.PREDICTOR_TENSORS`; cast and moved to where `llama` is."""
        weights = {name: tensor.to(llama.embedding) for name, tensor in weights.items()}
        self.config = config
        self.llama = llama
        self.norm_weight, self.norm_bias = weights["layer_norm.weight"], weights["layer_norm.bias"]
        self._in, self._mid, self._out = (linear(weights[f"linear_{name}.weight"]) for name in ("in", "mid", "out"))

    def step(self, h: torch.Tensor, token: int) -> torch.Tensor:
        """h [1, hidden] and the token that follows it → the predicted next hidden state, [1, hidden]."""
        x = torch.cat([h, self.llama.embedding[token : token + 1]], dim=-1)
        x = functional.layer_norm(
            x, self.norm_weight.shape, self.norm_weight, self.norm_bias, self.config.layer_norm_epsilon
        )
        return h + self._out(functional.gelu(self._mid(functional.gelu(self._in(x)))))

    def draft(self, h: torch.Tensor, token: int, sampling: Sampling, uniforms: Sequence[float]) -> Draft:
        """One drafted token per number in `uniforms`; a greedy draft ignores their values.

        Args:
            h: [1, hidden], the verified hidden state.
            token: the emitted token that follows it.
            sampling: the warping of the draft distribution, the same as the base model's.
        """
        tokens: list[int] = []
        probabilities: list[torch.Tensor] = []
        for uniform in uniforms:
            h = self.step(h, token)
            logits = self.llama.logits(h)[0]
            if sampling.greedy:
                token = int(logits.argmax())
            else:
                probabilities.append(sampling.probabilities(logits))
                token = draw(probabilities[-1], uniform)
            tokens.append(token)
        return Draft(tokens, torch.stack(probabilities) if probabilities else None)
