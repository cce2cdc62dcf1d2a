"""`nextlat-data stdlib` and `tokenizer`: their options and what they print."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.text.source_options import input_options, open_source
from data_tools.text.stdlib import write_stdlib
from data_tools.text.tokenizer import sample, train_tokenizer
from nextlat_dist.reporting.console import say


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    stdlib = commands.add_parser("stdlib", help="write the Python standard library as documents and held-out prompts")
    stdlib.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets stdlib.jsonl and prompts/")
    stdlib.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="of the characters to hold out (default: %(default)s)",
    )
    stdlib.set_defaults(run=_stdlib)

    tokenizer = commands.add_parser("tokenizer", parents=[input_options()], help="train a sentencepiece tokenizer")
    tokenizer.add_argument("--output", type=Path, required=True, metavar="FILE", help="the model")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="ids of the model")
    tokenizer.add_argument(
        "--input-bytes",
        type=int,
        default=1 << 24,
        help="train on a sample of about this size (default: %(default)s)",
    )
    tokenizer.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    tokenizer.set_defaults(run=_tokenizer)


def _stdlib(options: argparse.Namespace) -> None:
    for domain, counts in write_stdlib(options.output, options.validation_fraction).items():
        say("{}: {documents} documents, {held_out} of them held out, {prompts} prompts".format(domain, **counts))


def _tokenizer(options: argparse.Namespace) -> None:
    texts = sample(open_source(options).documents(), options.input_bytes, options.seed)
    size = sum(len(text.encode()) for text in texts)
    say(f"training on {len(texts)} documents, {size / 1e6:.1f} MB", error=True)
    tokenizer = train_tokenizer(texts, options.output, options.vocab_size)
    say(f"{options.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}…")
