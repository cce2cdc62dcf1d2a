"""State tracking: the running product of elements of a permutation group (the word problem).

    tokens   BOS x_1 x_2 … x_T EOS
    labels    –   –  x_1 x_1·x_2 … x_1·…·x_T          the state that has read x_i predicts the product of x_1 … x_i

Products are read from the left: x·y is first x, then y. Every element is drawn evenly. BOS and x_1 are the prompt, so
every product is predicted. For A5 and other groups that are not solvable no transformer of fixed depth can do it at any
length (Liu et al. 2023, arXiv 2210.10749); one that carries the product as its state can.

Invariant: the content of a document is its first `length` elements; test documents are at least that long, so no
training document is the beginning of one of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from nextlat_dist.errors import UserError
from nextlat_dist.tasks.base import require_at_least
from nextlat_dist.tasks.documents import BOS_ID, EOS_ID, FIRST_SYMBOL_ID, Document, Split, id_array
from nextlat_dist.tasks.groups import Group, make_group


@dataclass(frozen=True)
class StateTracking:
    """Words over one group; test documents have one of `test_length` elements, drawn evenly (default: as in training).

    Exactly one of `group` and `generators` is given.
    """

    length: int = field(metadata={"help": "elements of a training document"})
    group: str | None = field(
        default=None, metadata={"help": "Sn, An, Zn or Dn, such as S3, A5, Z60", "default": "that of --generators"}
    )
    generators: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "of any permutation group, in cycle notation: '(0 1 2)(3 4)' '(0 1)'",
            "default": "those of --group",
        },
    )
    test_length: tuple[int, ...] = field(
        default=(), metadata={"help": "elements of a test document, any of these", "default": "as in training"}
    )

    name = "state-tracking"

    def __post_init__(self) -> None:
        require_at_least(self.name, length=(self.length, 2))
        if (self.group is None) == (not self.generators):
            raise UserError(
                f"state-tracking needs a group: give --group or --generators, one of them (they are {self.group} and "
                f"{list(self.generators)})"
            )
        too_short = [length for length in self.test_length if length < self.length]
        if too_short:
            raise UserError(
                f"--test-length {too_short[0]} is shorter than --length {self.length}; test documents are compared "
                "with training documents by their first elements, so lower --length or raise --test-length"
            )
        if self.world.order < 2:
            raise UserError("the group has one element only, so there is nothing to track; give other --generators")

    @cached_property
    def world(self) -> Group:
        return make_group(self.group if self.group is not None else self.generators)

    @property
    def parameters(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def symbols(self) -> tuple[str, ...]:
        return self.world.names

    def products(self, elements: np.ndarray) -> np.ndarray:
        """int64 [T]: number of x_1·…·x_i for each i, of the element numbers [T]."""
        table = self.world.table
        products = elements.copy()
        for i in range(1, len(elements)):
            products[i] = table[products[i - 1], elements[i]]
        return products

    def sample(self, rng: np.random.Generator, split: Split) -> Document:
        lengths = self.test_length if split == "test" and self.test_length else (self.length,)
        length = lengths[int(rng.integers(len(lengths)))]
        elements = rng.integers(self.world.order, size=length)
        return Document(
            tokens=id_array([BOS_ID], elements + FIRST_SYMBOL_ID, [EOS_ID]),
            prompt_tokens=2,
            content=elements[: self.length].astype("<i8").tobytes(),
            labels=id_array([BOS_ID, elements[0] + FIRST_SYMBOL_ID], self.products(elements) + FIRST_SYMBOL_ID),
        )
