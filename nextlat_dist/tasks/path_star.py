"""Path-Star: find the way from the centre of a star to the end of one of its arms.

    BOS a b | c d | … / start goal = start … goal EOS

A star has `arms` arms of `length - 1` nodes around a centre; nodes are numbers below `nodes`, all different. Its edges,
each written from the centre outwards, come in random order; the goal is the end of an arm. Only the path and EOS are
predicted. The second node of the path needs all of it to be known, every other one is an edge looked up: a model that
only looks one step ahead guesses the arm, and is right once in `arms`. Source: Bachmann and Nagarajan 2024
(arXiv 2403.06963) as METHOD of Next-Latent Prediction uses it (arXiv 2511.05963): G(5,5) is `arms=5, length=5`.

Invariant: two documents with the same edges have the same content, whatever their order and goal, so no graph of the
training set is in the test set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.base import require_at_least
from nextlat_dist.tasks.documents import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, Document, Split, id_array


@dataclass(frozen=True)
class PathStar:
    """The stars with these numbers of arms and of nodes on a path, the centre counted."""

    arms: int = field(metadata={"help": "arms of the star"})
    length: int = field(metadata={"help": "nodes on a path, from the centre to the end of an arm"})
    nodes: int = field(default=100, metadata={"help": "nodes are numbers below this"})

    name = "path-star"

    def __post_init__(self) -> None:
        require_at_least(self.name, arms=(self.arms, 1), length=(self.length, 2))
        needed = self.arms * (self.length - 1) + 1
        if self.nodes < needed:
            raise UserError(
                f"a star of {self.arms} arms of length {self.length} has {needed} different nodes, but there are only "
                f"{self.nodes} numbers; raise --nodes to at least {needed}"
            )

    @property
    def parameters(self) -> dict[str, Any]:
        return asdict(self)

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        return (*map(str, range(self.nodes)), "|", "=", "/")

    @property
    def separator_id(self) -> int:
        return FIRST_SYMBOL_ID + self.nodes

    @property
    def equals_id(self) -> int:
        return FIRST_SYMBOL_ID + self.nodes + 1

    @property
    def slash_id(self) -> int:
        return FIRST_SYMBOL_ID + self.nodes + 2

    def sample(self, rng: np.random.Generator, split: Split) -> Document:
        """A star whose nodes, order of edges and goal are drawn evenly; both splits are drawn alike."""
        steps = self.length - 1
        drawn = rng.permutation(self.nodes)[: self.arms * steps + 1]
        start, arms = drawn[0], drawn[1:].reshape(self.arms, steps)
        arms = np.concatenate([np.full((self.arms, 1), start), arms], axis=1)
        edges = np.stack([arms[:, :-1], arms[:, 1:]], axis=2).reshape(-1, 2)
        path = arms[rng.integers(self.arms)]
        listed = np.full((len(edges), 3), self.separator_id)
        listed[:, :2] = edges[rng.permutation(len(edges))] + FIRST_SYMBOL_ID
        listed[-1, 2] = self.slash_id
        question = [start + FIRST_SYMBOL_ID, path[-1] + FIRST_SYMBOL_ID, self.equals_id]
        prompt = id_array([BOS_ID], listed.ravel(), question)
        codes = np.sort(edges[:, 0] * self.nodes + edges[:, 1])
        return Document(id_array(prompt, path + FIRST_SYMBOL_ID, [EOS_ID]), len(prompt), codes.astype("<i8").tobytes())
