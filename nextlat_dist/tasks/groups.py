"""Finite permutation groups with their multiplication table.

    make_group("S5")   make_group("Z60")   make_group(("(0 1 2)(3 4)", "(0 1)"))

S is all permutations of n points, A the even ones, Z the rotations of n points, D their rotations and reflections.

Invariant: products are read from the left: x·y is first x, then y, point i going to y[x[i]]. Element 0 is the identity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nextlat_dist.errors import UserError

LARGEST_ORDER = 1000
Permutation = tuple[int, ...]
CYCLES = re.compile(r"\s*(\(\s*\d+(?:[\s,]+\d+)*\s*\)\s*)+|\s*\(\s*\)\s*")


@dataclass(frozen=True)
class Group:
    """A group of permutations.

    Attributes:
        elements: int64 [order, points], elements[k, i] is where element k takes point i.
        table: int64 [order, order], table[a, b] is the number of a·b.
        names: of the elements, without spaces.
    """

    elements: np.ndarray
    table: np.ndarray
    names: tuple[str, ...]

    @property
    def order(self) -> int:
        return len(self.names)

    @property
    def is_abelian(self) -> bool:
        return bool((self.table == self.table.T).all())


@lru_cache(maxsize=8)
def make_group(group: str | tuple[str, ...]) -> Group:
    """The group of a name such as A5 or Z60, or that generators in cycle notation span.

    Raises:
        UserError: the name or a generator cannot be read, or the group is too large.
    """
    if isinstance(group, str):
        generators = _named(group)
        label = f"--group {group}"
    else:
        cycles = [_cycles(text) for text in group]
        points = max((point for parts in cycles for cycle in parts for point in cycle), default=0) + 1
        generators = [_permutation(parts, points) for parts in cycles]
        label = f"the group of --generators {' '.join(map(repr, group))}"
    elements = _closure(generators, label)
    array = np.array(elements, dtype=np.int64)
    # Permutations are found again by a linear hash that wraps around, a thousand times faster than by tuples.
    weights = np.random.default_rng(0).integers(2**62, size=array.shape[1])
    hashes = array @ weights
    order = np.argsort(hashes)
    assert len(np.unique(hashes)) == len(hashes)
    table = np.stack([order[np.searchsorted(hashes[order], y[array] @ weights)] for y in array], axis=1)
    rotations = isinstance(group, str) and group[0] == "Z"
    names = [str(element[0]) for element in elements] if rotations else [_name(element) for element in elements]
    return Group(array, table, tuple(names))


def _named(name: str) -> list[Permutation]:
    """Generators of S, A, Z or D."""
    match = re.fullmatch(r"([SAZD])(\d+)", name)
    if match is None or not (2 if match[1] in "SZ" else 3) <= (points := int(match[2])) <= LARGEST_ORDER:
        raise UserError(
            f"--group {name} is none of Sn and Zn with n from 2 and An and Dn with n from 3; name one, such as A5 or "
            "Z60, or give --generators in cycle notation"
        )
    rotation = tuple((i + 1) % points for i in range(points))
    if match[1] == "Z":
        return [rotation]
    if match[1] == "D":
        return [rotation, tuple(-i % points for i in range(points))]
    if match[1] == "S":
        return [_permutation([(0, i)], points) for i in range(1, points)]
    return [_permutation([(0, 1, i)], points) for i in range(2, points)]


def _cycles(text: str) -> list[tuple[int, ...]]:
    if not CYCLES.fullmatch(text):
        raise UserError(f"--generators {text!r} is no permutation in cycle notation; write it as '(0 1 2)(3 4)'")
    cycles = [tuple(map(int, re.findall(r"\d+", part))) for part in re.findall(r"\(([^)]*)\)", text)]
    points = [point for cycle in cycles for point in cycle]
    if len(set(points)) < len(points) or max(points, default=0) > LARGEST_ORDER:
        raise UserError(
            f"--generators {text!r} has a point twice or one above {LARGEST_ORDER}; a permutation moves every point "
            "once, write it as '(0 1 2)(3 4)'"
        )
    return cycles


def _permutation(cycles: Sequence[Sequence[int]], points: int) -> Permutation:
    image = list(range(points))
    for cycle in cycles:
        for point, following in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True):
            image[point] = following
    return tuple(image)


def _closure(generators: Sequence[Permutation], label: str) -> list[Permutation]:
    """All products of the generators, the identity first, then in lexical order."""
    identity = tuple(range(len(generators[0])))
    found = {identity}
    new = [identity]
    while new:
        products = {tuple(g[i] for i in element) for element in new for g in generators}
        new = [element for element in products if element not in found]
        found.update(new)
        if len(found) > LARGEST_ORDER:
            raise UserError(f"{label} has more than {LARGEST_ORDER} elements, each a token; choose a smaller group")
    return sorted(found)


def _name(element: Permutation) -> str:
    """Cycle notation with commas, `()` for the identity."""
    seen: set[int] = set()
    cycles = ""
    for point in range(len(element)):
        cycle = []
        while point not in seen:
            seen.add(point)
            cycle.append(point)
            point = element[point]  # noqa: PLW2901
        if len(cycle) > 1:
            cycles += f"({','.join(map(str, cycle))})"
    return cycles or "()"
