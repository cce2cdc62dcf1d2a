"""Drafts from the latent predictor: it advances the hidden state, and the base model's own head reads the result.

A cycle starts from a *verified* h_t and a token x_{t+1} that is already part of the output:
`ĥ_{t+1} = p_ψ(h_t, x_{t+1})`, `x̂_{t+2} ~ softmax(W ĥ_{t+1})`, `ĥ_{t+2} = p_ψ(ĥ_{t+1}, x̂_{t+2})`, and so on. No drafted
state outlives its cycle, so a wrong predictor costs speed and never changes the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from nextlat_dist.config.entries import PREDICTORS, resolve
from nextlat_dist.huggingface.drafters.format import StoredDrafter
from nextlat_dist.huggingface.drafters.latent_predictor import LatentPredictorConfig
from nextlat_dist.inference.drafting import Chooser, DraftMemory, Drawn, unroll
from nextlat_dist.inference.engine.graphs import Graphs
from nextlat_dist.inference.engine.linear import linear, output_head
from nextlat_dist.inference.engine.llama import Llama

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (h, e(x)) [rows, hidden] each → the next h


def concat_step(weights: dict[str, torch.Tensor], epsilon: float) -> Step:
    """The paper's form, `p_ψ(h, x) = h + MLP(LayerNorm([h, e(x)]))`; `epsilon` is the norm's."""
    norm_weight, norm_bias = weights["layer_norm.weight"], weights["layer_norm.bias"]
    into, mid, out = (linear(weights[f"linear_{name}.weight"]) for name in ("in", "mid", "out"))

    def step(h: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        x = torch.cat([h, embedded], dim=-1)
        x = functional.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, epsilon)
        return h + out(functional.gelu(mid(functional.gelu(into(x)))))

    return step


def _form(fusion: str) -> Callable[[dict[str, torch.Tensor], float], Step]:
    """How a predictor of that form advances; another form than the paper's is an entry of the predictors.

    Raises:
        UserError: neither this package nor an installed distribution has that form.
    """
    if fusion == LatentPredictorConfig.fusion:
        return concat_step
    form: Callable[[dict[str, torch.Tensor], float], Step] = resolve(PREDICTORS.find(fusion).drafting)
    return form


def build(stored: StoredDrafter, llama: Llama, graphs: Graphs | None) -> LatentPredictorDrafter:
    """The drafter of an export's `latent_predictor/`."""
    return LatentPredictorDrafter(stored.config, stored.weights, llama, stored.draft_vocabulary, graphs)


class LatentPredictorDrafter:
    """The predictor of the form that its config names, with the base model's own embedding e and output head."""

    longest: int | None = None

    def __init__(
        self,
        config: LatentPredictorConfig,
        weights: dict[str, torch.Tensor],
        llama: Llama,
        vocabulary: torch.Tensor | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        """`weights` as in `huggingface.drafters.latent_predictor`; cast and moved to where `llama` is. With `graphs`,
        draft steps and whole cycles of drafts go through them.
        """
        weights = {name: tensor.to(llama.embedding) for name, tensor in weights.items()}
        self.graphs = graphs
        self.embedding = llama.embedding
        self.vocabulary: torch.Tensor | None = None if vocabulary is None else vocabulary.to(llama.device)
        self.head = llama.logits if self.vocabulary is None else output_head(llama.head_weight[self.vocabulary])
        self._advance = _form(config.fusion)(weights, config.layer_norm_epsilon)

    def step(self, h: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """h [rows, hidden] and the tokens [rows] that follow it → the predicted next hidden states [rows, hidden]."""
        return self._advance(h, functional.embedding(tokens, self.embedding))

    def propose(self, h: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `step`, and the draft logits [rows, draft vocab] of the predicted states."""
        h = self.step(h, tokens)
        return h, self.head(h)

    def start(self, rows: int, capacity: int) -> DraftMemory:
        return _Rollout(self, self.graphs)


class _Rollout:
    """The latent predictor's memory: the predicted states of the cycle under way, and nothing of the past."""

    def __init__(self, predictor: LatentPredictorDrafter, graphs: Graphs | None) -> None:
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
