"""Drafts: what proposes tokens for the base model to verify, and the latent predictor as the first of them.

A cycle starts from a *verified* h_t and a token x_{t+1} that is already part of the output:
`ĥ_{t+1} = p_ψ(h_t, x_{t+1})`, `x̂_{t+2} ~ softmax(W ĥ_{t+1})`, `ĥ_{t+2} = p_ψ(ĥ_{t+1}, x̂_{t+2})`, and so on. No drafted
state outlives its cycle, so a wrong predictor costs speed and never changes the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from nextlat_dist.huggingface.drafters import PredictorConfig
from nextlat_dist.inference.engine.graphs import Graphs
from nextlat_dist.inference.engine.linear import linear
from nextlat_dist.inference.engine.llama import Llama
from nextlat_dist.inference.sampling import Sampling, draw


@dataclass(frozen=True)
class Chooser:
    """How a draft is chosen from a drafter's logits; `vocabulary` [draft vocab] holds the base ids of their columns."""

    sampling: Sampling
    vocabulary: torch.Tensor | None

    def scores(self, logits: torch.Tensor, normalised: bool) -> torch.Tensor:
        """What drafts are chosen by: the distribution q that they are drawn from; when greedy the logits, or the
        log-softmax of them if they are to tell the drafter's confidence too (`normalised`).
        """
        if not self.sampling.greedy:
            return self.sampling.probabilities(logits)
        return logits.log_softmax(dim=-1) if normalised else logits

    def confidences(self, scores: torch.Tensor) -> torch.Tensor:
        """[rows], the largest probability of each row (when greedy, that of temperature 1), from normalised scores."""
        best = scores.amax(dim=-1)
        return best.exp() if self.sampling.greedy else best

    def choose(self, scores: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drafted ids [rows] and their scores: the best ones when greedy, else drawn at `uniforms` [rows]."""
        if self.sampling.greedy:
            values, columns = scores.max(dim=-1)
        else:
            columns = draw(scores, uniforms)
            values = scores.gather(1, columns[:, None])[:, 0]
        return columns if self.vocabulary is None else self.vocabulary[columns], values


class Drawn(NamedTuple):
    """Drafts of every row at a stretch: [rows, steps] each, scores [rows, steps, draft vocab].

    Without a use for them, `confidences` and (when greedy) `scores` have no steps.
    """

    tokens: torch.Tensor
    values: torch.Tensor  # the scores of the tokens
    confidences: torch.Tensor
    scores: torch.Tensor


class DraftMemory(Protocol):
    """What drafting remembers of the rows of a batch, row by row as in the base model's cache."""

    def absorb(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        """Take note of verified states, after each chunk of the prefill and after each cycle.

        Args:
            states: [sum(counts), hidden], the base model's h at `counts[r]` new positions of row r, all of row 0 first.
            settled: of each row's new positions, how many (the first ones) stay; the rest was rejected.
        """

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        """A new cycle of the given rows of the batch, ascending (None: all of them), from the verified states
        h [rows, hidden] that their last tokens were picked from.
        """

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        """Logits of the next draft, [rows going on, draft vocab].

        Args:
            tokens: [rows going on], the token before it: the last emitted one, then the last drafted one.
            kept: which of the rows of the previous call in this cycle go on, ascending; None: all of them.
        """

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        """A cycle of all rows that drafts as many tokens as `uniforms` [rows, steps] has columns; see `begin`,
        `logits`.
        """

    def move(self, source: int, target: int) -> None:
        """Row `source` takes the place of `target`; the rows from `source` on are not used again."""


class Drafter(Protocol):
    """Proposes tokens; any proposals are lossless, good ones are fast."""

    longest: int | None  # most tokens it can draft in a cycle; None: any number
    vocabulary: torch.Tensor | None  # [draft vocab], base ids of the columns of its logits; None: the base's own

    def start(self, rows: int, capacity: int) -> DraftMemory:
        """The memory of a new batch of `rows` rows of up to `capacity` tokens."""


def unroll(
    memory: DraftMemory,
    chooser: Chooser,
    h: torch.Tensor,
    tokens: torch.Tensor,
    uniforms: torch.Tensor,
    confidences: bool,
) -> Drawn:
    """`DraftMemory.roll`, step by step; the host is not waited for."""
    memory.begin(h)
    steps: list[tuple[torch.Tensor, ...]] = []
    for step in range(uniforms.shape[1]):
        scores = chooser.scores(memory.logits(tokens, None), confidences)
        tokens, values = chooser.choose(scores, uniforms[:, step])
        steps.append((tokens, values, chooser.confidences(scores) if confidences else values, scores))
    ids, values, sure = (torch.stack(part, dim=1) for part in list(zip(*steps, strict=True))[:3])
    q = scores[:, None][:, :0] if chooser.sampling.greedy else torch.stack([own[3] for own in steps], dim=1)
    return Drawn(ids, values, sure if confidences else sure[:, :0], q)


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

    def absorb(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
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
