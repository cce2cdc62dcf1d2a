"""Controls of the belief report, models whose answers are known: one that passes everything, one that fails it.

    Oracle(hmm)                       its states are the exact beliefs, p_ψ is Bayes' rule, the head is exact
    Shuffled(model, seed)             the same model, its states shuffled over histories and positions

Invariant: both are `StateModel`s, and the measures cannot tell them from an export.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextlat_dist.inference.state_model import StateModel
from nextlat_dist.tasks import FIRST_SYMBOL_ID, vocab_size
from nextlat_dist.tasks.hmm import Hmm

SMALLEST = 1e-12  # the head's probability of what is impossible; keeps a wrong state's divergence finite


class Oracle:
    """States [..., states of the process] in float64: belief states by construction."""

    has_predictor = True

    def __init__(self, hmm: Hmm) -> None:
        self.hmm = hmm
        self.vocab_size, self.hidden_size = vocab_size(hmm), len(hmm.prior)

    def states(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.hmm.beliefs(tokens.numpy()))

    def logits(self, states: Tensor) -> Tensor:
        probabilities = torch.full((*states.shape[:-1], self.vocab_size), SMALLEST, dtype=torch.float64)
        emissions = torch.from_numpy(self.hmm.next_emission(states.numpy()))
        probabilities[..., FIRST_SYMBOL_ID:] = emissions.clamp(min=SMALLEST)
        return probabilities.log()

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.hmm.update(states.numpy(), tokens.numpy() - FIRST_SYMBOL_ID))


class Shuffled:
    """A model whose states have nothing to do with their histories; head and p_ψ stay what they are."""

    def __init__(self, model: StateModel, seed: int) -> None:
        self.model, self.seed = model, seed
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
        self.has_predictor = model.has_predictor

    def states(self, tokens: Tensor) -> Tensor:
        found = self.model.states(tokens)
        flat = found.reshape(-1, self.hidden_size)
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(self.seed))
        return flat[order].view(found.shape)

    def logits(self, states: Tensor) -> Tensor:
        return self.model.logits(states)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        return self.model.advance(states, tokens)
