"""Options that several commands have."""

from __future__ import annotations

import argparse

RECORD_TOKENS, SHARD_TOKENS = 32768, 1 << 26


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """--record-tokens and --shard-tokens: a record, a shard is closed as soon as it has so many."""
    for name, default in (("record", RECORD_TOKENS), ("shard", SHARD_TOKENS)):
        parser.add_argument(
            f"--{name}-tokens",
            type=int,
            default=default,
            metavar="N",
            help=f"close a {name} as soon as it has this many (default: %(default)s)",
        )


def add_boundaries(parser: argparse.ArgumentParser) -> None:
    """--bos and --eos: what stands around each document."""
    for name, verb in (("bos", "start"), ("eos", "end")):
        parser.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=True,
            help=f"{verb} documents with {name.upper()} (default: %(default)s)",
        )
