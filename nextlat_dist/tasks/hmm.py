"""Hidden Markov processes whose exact beliefs are known: BOS x_1 .. x_length, every token predicted.

    Hmm(process="mess3", length=64).sample(rng, "train") -> Document with beliefs [length + 1, states]

A process is its token-labelled transition matrices T[x][i, j] = P(emit x, go to j | in i). The belief after a history
is P(state | history), which is all that the history says about the future: b' ∝ b T[x], from the stationary
distribution on. Invariant: beliefs are Bayes' rule in float64, never estimated.

Processes: mess3 (Marzen & Crutchfield 2017; x, alpha), z1r (zero, one, random), rrxor (two random bits, then their
xor), even (runs of ones of even length), random (states, emissions, process_seed; Dirichlet rows).
Command: `nextlat-data task hmm --output DIR …`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.base import require_at_least
from nextlat_dist.tasks.documents import BOS_ID, FIRST_SYMBOL_ID, Document, Split, id_array

OPTIONS: dict[str, dict[str, float]] = {  # those of each process besides its length, with their defaults
    "mess3": {"x": 0.15, "alpha": 0.6},
    "z1r": {},
    "rrxor": {},
    "even": {},
    "random": {"states": 4, "emissions": 4, "process_seed": 0},
}
OWN_OPTIONS = ("x", "alpha", "states", "emissions", "process_seed")
CONCENTRATION = 0.3  # of the Dirichlet rows of a random process; below 1, so that tokens tell states apart


@dataclass(frozen=True)
class Hmm:
    """A hidden Markov process, and documents of `length` tokens of it.

    Options that are None have the defaults of `OPTIONS`, if they are the process's own.

    Raises:
        UserError: an unknown process, an option of another one, or a value out of range.
    """

    process: str = field(default="mess3", metadata={"help": f"one of {', '.join(OPTIONS)}"})
    length: int = field(default=64, metadata={"help": "tokens of a document, BOS not counted"})
    x: float | None = field(default=None, metadata={"help": "mess3: chance to go to each other state", "default": 0.15})
    alpha: float | None = field(
        default=None, metadata={"help": "mess3: chance that a state emits its own token", "default": 0.6}
    )
    states: int | None = field(default=None, metadata={"help": "random: hidden states", "default": 4})
    emissions: int | None = field(default=None, metadata={"help": "random: different tokens", "default": 4})
    process_seed: int | None = field(default=None, metadata={"help": "random: which process", "default": 0})

    name = "hmm"

    def __post_init__(self) -> None:
        if self.process not in OPTIONS:
            raise UserError(f"hmm with --process {self.process} is no task; it must be one of {', '.join(OPTIONS)}")
        require_at_least(self.name, length=(self.length, 1))
        for option in OWN_OPTIONS:
            default = OPTIONS[self.process].get(option)
            if getattr(self, option) is None:
                object.__setattr__(self, option, default)
            elif default is None:
                raise UserError(
                    f"--{option.replace('_', '-')} {getattr(self, option)} says nothing to the process {self.process}; "
                    "leave it out, or choose another --process"
                )
        if self.x is not None and self.alpha is not None and not (0 < self.x < 0.5 and 0 < self.alpha < 1):
            raise UserError(
                f"mess3 with --x {self.x} --alpha {self.alpha} is no process; x must be between 0 and 0.5, alpha "
                "between 0 and 1"
            )
        if self.states is not None and self.emissions is not None:
            require_at_least(self.name, states=(self.states, 2), emissions=(self.emissions, 2))

    @property
    def parameters(self) -> dict[str, Any]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(f"x{number}" for number in range(len(self.transitions)))

    @cached_property
    def transitions(self) -> np.ndarray:
        """T, float64 [emissions, states, states]; the sum over emissions is a stochastic matrix."""
        if self.x is not None and self.alpha is not None:
            return _mess3(self.x, self.alpha)
        if self.states is not None and self.emissions is not None:
            outcomes = np.full(self.emissions * self.states, CONCENTRATION)
            rows = np.random.default_rng(self.process_seed).dirichlet(outcomes, size=self.states)
            return rows.reshape(self.states, self.emissions, self.states).transpose(1, 0, 2).copy()
        return _machine(MACHINES[self.process])

    @cached_property
    def prior(self) -> np.ndarray:
        """float64 [states]: the stationary distribution, the belief before the first token."""
        total = self.transitions.sum(axis=0)
        equations = np.vstack([total.T - np.eye(len(total)), np.ones(len(total))])
        solution = np.linalg.lstsq(equations, np.append(np.zeros(len(total)), 1.0), rcond=None)[0]
        return np.clip(solution, 0, None) / np.clip(solution, 0, None).sum()

    @cached_property
    def emission(self) -> np.ndarray:
        """float64 [states, emissions]: P(x | in i)."""
        return self.transitions.sum(axis=2).T

    def update(self, beliefs: np.ndarray, emitted: np.ndarray) -> np.ndarray:
        """Bayes' rule: beliefs [..., states] and what was emitted next, [...] in 0 .. emissions - 1 → [..., states].

        Of what the belief holds impossible nothing can be learnt: the belief is the prior then.
        """
        joint = np.einsum("...i,...ij->...j", beliefs, self.transitions[emitted])
        total = joint.sum(axis=-1, keepdims=True)
        return np.where(total > 0, joint / np.where(total > 0, total, 1.0), self.prior)

    def beliefs(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [..., n, states]: the belief after each token of documents [..., n] (ids, BOS first)."""
        assert (tokens[..., 0] == BOS_ID).all(), "a document begins with BOS"
        emitted = tokens[..., 1:] - FIRST_SYMBOL_ID
        belief = np.broadcast_to(self.prior, (*tokens.shape[:-1], len(self.prior)))
        found = [belief]
        for step in range(emitted.shape[-1]):
            belief = self.update(belief, emitted[..., step])
            found.append(belief)
        return np.stack(found, axis=-2)

    def next_emission(self, beliefs: np.ndarray, steps: int = 1) -> np.ndarray:
        """float64 [..., emissions]: the distribution of the token `steps` ahead (1: the next one) given beliefs
        [..., states].
        """
        total = np.linalg.matrix_power(self.transitions.sum(axis=0), steps - 1)
        return beliefs @ total @ self.emission

    def emit(self, rng: np.random.Generator, state: int, length: int) -> list[int]:
        """`length` emissions, from a hidden state on."""
        states = len(self.prior)
        emitted = []
        for uniform in rng.random(length).tolist():
            x, state = divmod(bisect_right(self._cumulative[state], uniform), states)
            emitted.append(x)
        return emitted

    @cached_property
    def _cumulative(self) -> list[list[float]]:
        """Of each state, the cumulative probabilities of (x, next state), those that are 0 never hit."""
        flat = self.transitions.transpose(1, 0, 2).reshape(len(self.prior), -1)
        rows = np.cumsum(flat, axis=1)
        rows[np.cumsum(flat[:, ::-1], axis=1)[:, ::-1] <= flat] = np.inf  # the last possible one takes the rounding
        return [row.tolist() for row in rows]

    def sample(self, rng: np.random.Generator, split: Split) -> Document:
        """A document from the stationary distribution on; both splits are drawn alike."""
        emitted = self.emit(rng, int(rng.choice(len(self.prior), p=self.prior)), self.length)
        tokens = id_array([BOS_ID], np.array(emitted) + FIRST_SYMBOL_ID)
        beliefs = self.beliefs(tokens).astype(np.float32)
        return Document(tokens, 1, tokens[1:].astype("<i8").tobytes(), beliefs=beliefs)


def _mess3(x: float, alpha: float) -> np.ndarray:
    """Three states, each with a token of its own: T[x][i, j] = P(i → j) · P(x | arriving at j)."""
    go = np.full((3, 3), x) + (1 - 3 * x) * np.eye(3)
    arrive = np.full((3, 3), (1 - alpha) / 2) + (alpha - (1 - alpha) / 2) * np.eye(3)  # [token, j]
    return go[None] * arrive[:, None]


# state → (probability, token, next state), of processes without options
MACHINES: dict[str, list[list[tuple[float, int, int]]]] = {
    "z1r": [[(1.0, 0, 1)], [(1.0, 1, 2)], [(0.5, 0, 0), (0.5, 1, 0)]],
    "rrxor": [
        [(0.5, 0, 1), (0.5, 1, 2)],
        [(0.5, 0, 3), (0.5, 1, 4)],
        [(0.5, 0, 4), (0.5, 1, 3)],
        [(1.0, 0, 0)],
        [(1.0, 1, 0)],
    ],
    "even": [[(0.5, 0, 0), (0.5, 1, 1)], [(1.0, 1, 0)]],
}


def _machine(states: list[list[tuple[float, int, int]]]) -> np.ndarray:
    transitions = np.zeros((2, len(states), len(states)))
    for state, ways in enumerate(states):
        for probability, token, target in ways:
            transitions[token, state, target] += probability
    return transitions
