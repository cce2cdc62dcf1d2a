"""`nextlat-data`: from text to shards, and what can be done with them.

nextlat-data stdlib    --output corpus
nextlat-data tokenizer --input corpus/stdlib.jsonl --output corpus/tokenizer.model --vocab-size 4096
nextlat-data shard     --input corpus/stdlib.jsonl --tokenizer corpus/tokenizer.model --output data
nextlat-data index     tars/ --tokenizer corpus/tokenizer.model
nextlat-data verify    data
nextlat-data inspect   data
nextlat-data reshard   tars/ data --output all
nextlat-data task path-star --arms 2 --length 5 --output data/star --train 100_000 --test 1000
nextlat-data mix-preview --source a=data/a:0.7 --source b=data/b:0.3 --tokens 1_000_000_000

Invariant: bad input ends with one sentence on standard error and exit status 2; results go to standard output, progress
to standard error. A command that finds what it looks for, as `verify` does, may end with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools import inspect, mix_preview, task_command, verify
from data_tools.shards import command as shard_command
from data_tools.shards import reshard
from data_tools.tars import index
from data_tools.text.source_options import input_options, open_source
from data_tools.text.stdlib import write_stdlib
from data_tools.text.tokenizer import sample, train_tokenizer
from nextlat_dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _stdlib(options: argparse.Namespace) -> None:
    for domain, counts in write_stdlib(options.output, options.validation_fraction).items():
        print("{}: {documents} documents, {held_out} of them held out, {prompts} prompts".format(domain, **counts))


def _tokenizer(options: argparse.Namespace) -> None:
    texts = sample(open_source(options).documents(), options.input_bytes, options.seed)
    size = sum(len(text.encode()) for text in texts)
    print(f"training on {len(texts)} documents, {size / 1e6:.1f} MB", file=sys.stderr)
    tokenizer = train_tokenizer(texts, options.output, options.vocab_size)
    print(f"{options.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}…")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nextlat-data", description="From text to shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inputs = input_options()

    stdlib = commands.add_parser("stdlib", help="write the Python standard library as documents and held-out prompts")
    stdlib.add_argument("--output", type=Path, required=True, metavar="DIR")
    stdlib.add_argument("--validation-fraction", type=float, default=0.05, metavar="F")
    stdlib.set_defaults(run=_stdlib)

    tokenizer = commands.add_parser("tokenizer", parents=[inputs], help="train a sentencepiece tokenizer")
    tokenizer.add_argument("--output", type=Path, required=True, metavar="FILE")
    tokenizer.add_argument("--vocab-size", type=int, required=True)
    tokenizer.add_argument("--input-bytes", type=int, default=1 << 24, help="train on a sample of about this size")
    tokenizer.add_argument("--seed", type=int, default=0, help="of the sample")
    tokenizer.set_defaults(run=_tokenizer)

    shard_command.add_command(commands, inputs)
    index.add_command(commands)
    verify.add_command(commands)
    inspect.add_command(commands)
    reshard.add_command(commands)
    mix_preview.add_command(commands)
    task_command.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
