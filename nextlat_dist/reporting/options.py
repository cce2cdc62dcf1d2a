"""Types of command-line arguments that several commands take; argparse makes a sentence of their ValueError."""

from __future__ import annotations


def integers(text: str) -> list[int]:
    """`0..3,8` -> [0, 1, 2, 3, 8]."""
    values: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        values += range(int(first), int(last) + 1) if dots else [int(part)]
    return values


def numbers(text: str) -> list[float]:
    """`0,0.6,1` -> [0.0, 0.6, 1.0]."""
    return [float(part) for part in text.split(",")]
