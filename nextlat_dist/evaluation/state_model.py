"""An export opened for looking inside: hidden states of whole documents, the head on them, the latent predictor.

    Latents(export: Path, device: str | None = None, dtype: torch.dtype = torch.float32)

What a measurement of latents needs is the protocol `StateModel`, so that the same measures run on models whose answers
are known (`belief_controls`). The states are the h of the method: behind the final norm, what the output head reads.
What comes out is plain tensors without a gradient: probes may be fitted on them.
Invariant: `logits(states(tokens))` are those of `transformers` on the export, to rounding, at any length: rotary
positions go on beyond the trained context.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.base import LlamaConfig, load_base_weights, weights_sha256
from nextlat_dist.huggingface.drafters.latent_predictor import load_predictor
from nextlat_dist.inference.drafters.latent_predictor import LatentPredictor
from nextlat_dist.inference.engine.llama import Llama

CHUNK_TOKENS = 16384  # of all rows of a chunk together; bounds the memory of activations


class StateModel(Protocol):
    """States of histories, what they say about the next token, and how they move when it comes."""

    vocab_size: int
    hidden_size: int
    has_predictor: bool

    def states(self, tokens: Tensor) -> Tensor:
        """tokens int64 [b, s] → [b, s, hidden]; position t has read tokens 0 .. t."""

    def logits(self, states: Tensor) -> Tensor:
        """[..., hidden] → logits of the next token [..., vocab]."""

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """States [..., hidden] and the tokens [...] that come next → the predicted next states [..., hidden]."""


class Latents:
    """The base model and latent predictor of one export.

    Raises:
        UserError: no export, no plain Llama, or a predictor of other base weights.
    """

    def __init__(self, export: Path, device: str | None = None, dtype: torch.dtype = torch.float32) -> None:
        """`device`: "cuda" if there is one, else "cpu". `dtype`: whatever the weights are stored in."""
        self.export = export
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        self._weights = load_base_weights(export)
        self._config = LlamaConfig.from_directory(export)
        self._llama = Llama(self._config, self._weights, self.device, dtype)
        stored = load_predictor(export, weights_sha256(self._weights))
        self._predictor = None if stored is None else LatentPredictor(stored.config, stored.weights, self._llama)
        self.predictor_hidden_size = None if stored is None else stored.config.predictor_hidden_size
        self.vocab_size, self.hidden_size = self._config.vocab_size, self._config.hidden_size
        self.has_predictor = self._predictor is not None

    @property
    def embedding(self) -> Tensor:
        """e: the input embedding [vocab, hidden]."""
        return self._llama.embedding

    @property
    def head_weight(self) -> Tensor:
        """W: the output head [vocab, hidden]."""
        return self._llama.head_weight

    @torch.no_grad()
    def states(self, tokens: Tensor) -> Tensor:
        """tokens int64 [b, s] → h [b, s, hidden], in chunks of rows."""
        rows, length = tokens.shape
        self._reach(length)
        tokens = tokens.to(self.device)
        found = []
        for part in tokens.split(max(1, CHUNK_TOKENS // length)):
            cache = self._llama.new_cache(len(part), length, layers=len(self._llama.layers))
            h = self._llama.forward(part.reshape(-1), [length] * len(part), cache)
            found.append(h.view(len(part), length, self.hidden_size))
        return torch.cat(found) if rows else tokens.new_zeros((0, length, self.hidden_size), dtype=self.dtype)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """[..., hidden] → [..., vocab]."""
        return self._llama.logits(states.reshape(-1, self.hidden_size)).view(*states.shape[:-1], self.vocab_size)

    @torch.no_grad()
    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """p_ψ: states [..., hidden] and the next tokens [...] → [..., hidden].

        Raises:
            UserError: the export has no latent predictor.
        """
        if self._predictor is None:
            raise UserError(
                f"{self.export} has no latent predictor to roll out; export a run trained with objective.name nextlat"
            )
        flat = self._predictor.step(states.reshape(-1, self.hidden_size), tokens.to(self.device).reshape(-1))
        return flat.view(states.shape)

    def _reach(self, length: int) -> None:
        """Rotary tables for `length` positions, where the context was trained shorter."""
        if length > self._llama.config.max_position_embeddings:
            config = replace(self._config, max_position_embeddings=length)
            self._llama = Llama(config, self._weights, self.device, self.dtype)
