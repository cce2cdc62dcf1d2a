"""Decide which documents are held out: by a hash of their name, the same on every machine and for every input order.

Invariant: raising the fraction only moves documents from train to validation, never back.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation"]


def unit_hash(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone, evenly spread."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(key: str, validation_fraction: float) -> Split:
    return "validation" if unit_hash(key) < validation_fraction else "train"
