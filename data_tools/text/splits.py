"""Decide which documents are held out: by a hash of their name, the same on every machine and for every input order.

Invariant: raising the fraction of `split_of` only moves documents from train to validation, never back; `hold_out`
never parts documents that share a passage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

Split = Literal["train", "validation"]
PASSAGE_CHARACTERS = 200


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone, evenly spread."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(key: str, validation_fraction: float) -> Split:
    return "validation" if unit_hash(key) < validation_fraction else "train"


def related(texts: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Names in groups: two whose texts share a passage are in one group, directly or through others.

    A passage is `PASSAGE_CHARACTERS` characters from the start of a line, indentation and blank lines aside.
    """
    parent = {name: name for name in texts}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    first_with: dict[str, str] = {}
    for name, parts in texts.items():
        for part in parts:
            lines = [stripped for line in part.splitlines() if (stripped := line.strip())]
            squeezed = "\n".join(lines)
            at = 0
            for line in lines:
                if at + PASSAGE_CHARACTERS > len(squeezed):
                    break
                parent[root(name)] = root(first_with.setdefault(squeezed[at : at + PASSAGE_CHARACTERS], name))
                at += len(line) + 1
    groups: dict[str, list[str]] = {}
    for name in texts:
        groups.setdefault(root(name), []).append(name)
    return list(groups.values())


def hold_out(texts: Mapping[str, Sequence[str]], fraction: float) -> set[str]:
    """Names to validate on: whole groups of related ones, by hash, until they make up `fraction` of the characters.

    By size and not by a threshold on the hash, because the texts may be few and of very different lengths. A group that
    alone is larger than the fraction is never held out.
    """
    sizes = {name: sum(map(len, parts)) for name, parts in texts.items()}
    wanted = fraction * sum(sizes.values())
    held: set[str] = set()
    held_size = 0
    for group in sorted(related(texts), key=lambda names: min(map(unit_hash, names))):
        size = sum(sizes[name] for name in group)
        if held_size < wanted and size <= wanted:
            held.update(group)
            held_size += size
    return held
