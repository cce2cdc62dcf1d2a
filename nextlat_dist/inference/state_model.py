"""The hidden states of an export's model on whole documents, the head on them, its latent predictor, its answers.

    ExportModel(export: OpenedExport | Path, device: str | None = None, dtype: torch.dtype = torch.float32)

A measurement of states takes the protocol `StateModel`, so that it also runs on models whose answers are known
(`belief.controls`). The states are the h of the method: after the final norm, what the output head reads. They are
plain tensors without a gradient: probes may be fitted on them.
Invariant: `logits(states(tokens))` are those of `transformers` on the export, to rounding, at any length: rotary
positions continue beyond the trained context.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nextlat_dist.errors import UserError
from nextlat_dist.huggingface.opened import OpenedExport, open_export
from nextlat_dist.inference.decoder import Decoder
from nextlat_dist.inference.drafters.latent_predictor import LatentPredictorDrafter
from nextlat_dist.inference.loading import default_device, llama_of

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


class ExportModel:
    """The base model and latent predictor of one export; a `StateModel`.

    Raises:
        UserError: no export, no plain Llama, or a drafter of other base weights.
    """

    def __init__(
        self, export: OpenedExport | Path, device: str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """`device`: "cuda" if there is one, else "cpu". `dtype`: whatever the weights are stored in."""
        self._opened = export if isinstance(export, OpenedExport) else open_export(export)
        self.export = self._opened.path
        self.device = device or default_device()
        self.dtype = dtype
        self._llama = llama_of(self._opened, self.device, dtype)
        stored = self._opened.drafter
        drafter = None if stored is None else stored.kind.build(stored, self._llama, None)
        self._predictor = drafter if isinstance(drafter, LatentPredictorDrafter) else None
        self.has_predictor = self._predictor is not None
        self.predictor_hidden_size: int | None = None
        if stored is not None and self.has_predictor:
            self.predictor_hidden_size = stored.config.predictor_hidden_size
        config = self._opened.config
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size

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
            found.append(h.view(len(part), length, -1)[..., : self.hidden_size])
        return torch.cat(found) if rows else tokens.new_zeros((0, length, self.hidden_size), dtype=self.dtype)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """[..., hidden] → [..., vocab]."""
        return self._llama.head(states.reshape(-1, self.hidden_size)).view(*states.shape[:-1], self.vocab_size)

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

    def decoder(self, context: int) -> Decoder:
        """Plain decoding of `context` tokens at least, with the weights that are already here. A document of n tokens
        trains a context of n - 1, which is one less than the decoder wants for it.
        """
        self._reach(context)
        return Decoder(self._opened, self._llama, None)

    def _reach(self, length: int) -> None:
        """Rotary tables for `length` positions, where the context was trained shorter."""
        if length > self._llama.config.max_position_embeddings:
            self._llama = llama_of(self._opened, self.device, self.dtype, context=length)
