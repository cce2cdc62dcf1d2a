"""Drafts from the latent predictor: it advances the hidden state, and the base model's own head reads the result.

A cycle starts from a *verified* h_t and a token x_{t+1} that is already part of the output:
`ĥ_{t+1} = p_ψ(h_t, x_{t+1})`, `x̂_{t+2} ~ softmax(W ĥ_{t+1})`, `ĥ_{t+2} = p_ψ(ĥ_{t+1}, x̂_{t+2})`, and so on. No drafted
state outlives its cycle, so a wrong predictor costs speed and never changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from nextlat_dist.huggingface.drafters import PredictorConfig
from nextlat_dist.inference.drafters.base import Chooser, DraftMemory, Drawn, unroll
from nextlat_dist.inference.engine.graphs import Graphs
from nextlat_dist.inference.engine.linear import linear
from nextlat_dist.inference.engine.llama import Llama


class LatentPredictor:
    """`p_ψ(h, x) = h + MLP(LayerNorm([h, e(x)]))` with the base model's own embedding e and output head."""

    longest: int | None = None

    def __init__(
        self,
        config: PredictorConfig,
        weights: dict[str, torch.Tensor],
        llama: Llama,
        vocabulary: torch.Tensor | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """`weights` as in `export.layout.PREDICTOR_TENSORS`; cast and moved to where `llama` is. With `graphs`, draft
        steps and whole cycles of drafts go through them.
        """
        weights = {name: tensor.to(llama.embedding) for name, tensor in weights.items()}
        self.config = config
        self.graphs = graphs
        self.embedding = llama.embedding
        self.vocabulary: torch.Tensor | None = None if vocabulary is None else vocabulary.to(llama.device)
        self.head = llama.logits if self.vocabulary is None else linear(llama.head_weight[self.vocabulary])
        self.norm_weight, self.norm_bias = weights["layer_norm.weight"], weights["layer_norm.bias"]
        self._in, self._mid, self._out = (linear(weights[f"linear_{name}.weight"]) for name in ("in", "mid", "out"))

    def step(self, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """h [rows, hidden] and the tokens [rows] that follow it → the predicted next hidden states [rows, hidden]."""
        x = torch.cat([h, functional.embedding(tokens, self.embedding)], dim=-1)
        x = functional.layer_norm(
            x, self.norm_weight.shape, self.norm_weight, self.norm_bias, self.config.layer_norm_epsilon
        )
        return h + self._out(functional.gelu(self._mid(functional.gelu(self._in(x)))))

    def propose(self, h: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `step`, and the draft logits [rows, draft vocab] of the predicted states."""
        h = self.step(h, tokens)
        return h, self.head(h)

    def start(self, rows: int, capacity: int) -> DraftMemory:
        return _Rollout(self, self.graphs)


class _Rollout:
    """The latent predictor's memory: the predicted states of the cycle under way, and nothing of the past."""

    def __init__(self, predictor: LatentPredictor, graphs: Graphs | None) -> None:
        self.predictor = predictor
        self.graphs = graphs
        self.h = torch.empty(0)

    def observe(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        pass

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        self.h = h

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        h = self.h if kept is None else self.h[kept]
        if self.graphs is None:
            self.h, logits = self.predictor.propose(h, tokens)
        else:
            self.h, logits = self.graphs.run("propose", self.predictor.propose, h, tokens)
        return logits

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        if self.graphs is None:
            return unroll(self, chooser, h, tokens, uniforms, confidences)
        bare = _Rollout(self.predictor, None)

        def cycle(h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor) -> Drawn:
            return unroll(bare, chooser, h, tokens, uniforms, confidences)

        key = (uniforms.shape[1], chooser.sampling, confidences)
        return Drawn(*self.graphs.run(key, cycle, h, tokens, uniforms))

    def move(self, source: int, target: int) -> None:
        pass
