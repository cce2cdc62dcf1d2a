"""Drafts from joint multi-token prediction: Fetch reads the drafted tokens and predicts the one after them.

From the last verified state h_t: c_0 = c(h_t, e(x_t)), c_1 = c(h_t, e(x_{t+1})) of the token that is out already, then
those of the drafts; place i attends to places 0 .. i and proposes x_{t+1+i}, i = 1 .. d. So with the next token, which
the base itself picks, a state gives d + 1 tokens. Nothing outlives a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.drafters.format import StoredDrafter
from nextlat_dist.huggingface.drafters.jtp import JTPConfig
from nextlat_dist.inference.drafting import Chooser, DraftMemory, Drawn, unroll
from nextlat_dist.inference.engine.fetch import FetchWeights
from nextlat_dist.inference.engine.graphs import Graphs
from nextlat_dist.inference.engine.llama import Llama


def build(stored: StoredDrafter, llama: Llama, graphs: Graphs | None) -> JointTokenPrediction:
    """The drafter of an export's `jtp/`; its steps are not captured in graphs.

    Raises:
        UserError: the base has no Fetch.
    """
    fetch = getattr(llama, "fetch", None)
    if not isinstance(fetch, FetchWeights):
        raise UserError(f"{stored.directory} drafts with the base's Fetch, but the base has none; export the run again")
    return JointTokenPrediction(stored.config, llama, fetch)


class JointTokenPrediction:
    """Fetch of the base model, with its own final norm and output head."""

    vocabulary: torch.Tensor | None = None

    def __init__(self, config: JTPConfig, llama: Llama, fetch: FetchWeights) -> None:
        self.llama, self.fetch = llama, fetch
        self.longest: int | None = config.horizon

    def start(self, rows: int, capacity: int) -> DraftMemory:
        return _Cycle(self)


class _Cycle:
    """Keys and values of the places so far, of the rows that continue."""

    def __init__(self, drafter: JointTokenPrediction) -> None:
        self._drafter = drafter
        self._h = torch.empty(0)
        self._keys: list[torch.Tensor] = []  # of each place [rows, heads, head size]
        self._values: list[torch.Tensor] = []

    def observe(self, states: torch.Tensor, counts: Sequence[int], settled: Sequence[int]) -> None:
        pass

    def begin(self, h: torch.Tensor, rows: Sequence[int] | None = None) -> None:
        _, self._h, c = h.chunk(3, dim=-1)
        self._keys, self._values = [], []
        self._place(c)

    def logits(self, tokens: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        fetch, llama = self._drafter.fetch, self._drafter.llama
        if kept is not None:
            self._h = self._h[kept]
            self._keys, self._values = ([part[kept] for part in parts] for parts in (self._keys, self._values))
        c = fetch.read(self._h, functional.embedding(tokens, llama.embedding))
        self._place(c)
        place = len(self._keys)
        keys, values = torch.stack(self._keys, dim=2), torch.stack(self._values, dim=2)  # [rows, heads, places, size]
        query = fetch.query(c).view(len(c), fetch.heads, 1, -1)
        scores = (query * keys).sum(dim=-1) * query.shape[-1] ** -0.5 + fetch.relative_bias[:, place - 1, :place]
        read = (scores.softmax(dim=-1)[..., None] * values).sum(dim=2).reshape(len(c), -1)
        return llama.head(llama.normed(fetch.out(read) + self._h))

    def roll(
        self, chooser: Chooser, h: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, confidences: bool
    ) -> Drawn:
        return unroll(self, chooser, h, tokens, uniforms, confidences)

    def move(self, source: int, target: int) -> None:
        pass

    def _place(self, c: torch.Tensor) -> None:
        fetch = self._drafter.fetch
        self._keys.append(fetch.key(c).view(len(c), fetch.heads, -1))
        self._values.append(fetch.value(c).view(len(c), fetch.heads, -1))
