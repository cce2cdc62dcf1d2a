"""`nextlat-data`: from text to shards.

    nextlat-data stdlib    --output corpus
    nextlat-data tokenizer --input corpus/stdlib.jsonl --output corpus/tokenizer.model --vocab-size 4096
    nextlat-data shard     --input corpus/stdlib.jsonl --tokenizer corpus/tokenizer.model --output data --split-field
    split nextlat-data inspect   data/validation

Invariant: bad input ends with one sentence on standard error and exit status 2; results go to standard output, progress
to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.inspect import inspect
from data_tools.shard import ShardOptions, describe, input_bytes, shard
from data_tools.sources import STDIN, Fields, SourceFile, find_files, read_documents
from data_tools.stdlib import write_stdlib
from data_tools.tokenizer import sample, train_tokenizer
from nextlat_dist.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _stdlib(options: argparse.Namespace) -> None:
    for domain, counts in write_stdlib(options.output, options.validation_fraction).items():
        print("{}: {documents} documents, {held_out} of them held out, {prompts} prompts".format(domain, **counts))


def _tokenizer(options: argparse.Namespace) -> None:
    documents = read_documents(_files(options), Fields(text=options.field), options.format)
    texts = sample(documents, options.input_bytes, options.seed)
    size = sum(len(text.encode()) for text in texts)
    print(f"training on {len(texts)} documents, {size / 1e6:.1f} MB", file=sys.stderr)
    tokenizer = train_tokenizer(texts, options.output, options.vocab_size)
    print(f"{options.output}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}…")


def _shard(options: argparse.Namespace) -> None:
    plan = ShardOptions(
        tokenizer=options.tokenizer,
        output=options.output,
        split=options.split,
        validation_fraction=options.validation_fraction,
        split_by_field=options.split_field is not None,
        has_prompts=options.prompt_field is not None,
        bos=options.bos,
        eos=options.eos,
        on_invalid=options.on_invalid,
        record_tokens=options.record_tokens,
        shard_tokens=options.shard_tokens,
        workers=options.workers,
        overwrite=options.overwrite,
    )
    files = _files(options)
    fields = Fields(text=options.field, prompt=options.prompt_field, split=options.split_field)
    manifests = shard(read_documents(files, fields, options.format), plan, total_bytes=input_bytes(files))
    for manifest in manifests:
        print(describe(manifest, plan.splits[manifest.split]))


def _inspect(options: argparse.Namespace) -> None:
    print(inspect(options.dataset, samples=options.samples, sample_tokens=options.sample_tokens, png=options.png))


def _files(options: argparse.Namespace) -> list[SourceFile]:
    return find_files(options.input, options.glob, options.exclude)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nextlat-data", description="From text to shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inputs = argparse.ArgumentParser(add_help=False)
    inputs.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="SRC",
        help=f"folders, globs, text files, .jsonl[.gz|.zst], .parquet, or {STDIN} for standard input",
    )
    inputs.add_argument("--glob", nargs="+", default=[], metavar="PATTERN", help="take only these files of a folder")
    inputs.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="leave out these files of a folder")
    inputs.add_argument("--field", default="text", help="text field of JSONL and Parquet (default: text)")
    inputs.add_argument("--format", choices=("lines", "jsonl"), default="lines", help="of standard input")

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

    sharding = commands.add_parser("shard", parents=[inputs], help="tokenise documents into shards")
    sharding.add_argument("--tokenizer", type=Path, required=True, metavar="FILE")
    sharding.add_argument("--output", type=Path, required=True, metavar="DIR")
    sharding.add_argument("--prompt-field", help="field whose tokens come first and are never predicted")
    split = sharding.add_mutually_exclusive_group()
    split.add_argument("--split", choices=("train", "validation"), default="train", help="name of the one dataset")
    split.add_argument("--validation-fraction", type=float, metavar="F", help="hold out by a hash of the name")
    split.add_argument("--split-field", help="field that says train or validation")
    sharding.add_argument("--bos", action=argparse.BooleanOptionalAction, default=True, help="start documents with BOS")
    sharding.add_argument("--eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with EOS")
    sharding.add_argument("--on-invalid", choices=("replace", "skip", "fail"), default="replace", help="not UTF-8")
    sharding.add_argument("--record-tokens", type=int, default=ShardOptions.record_tokens)
    sharding.add_argument("--shard-tokens", type=int, default=ShardOptions.shard_tokens)
    sharding.add_argument("--workers", type=int, default=_cores(), help="processes (default: all cores)")
    sharding.add_argument("--overwrite", action="store_true", help="replace a dataset in OUTPUT")
    sharding.set_defaults(run=_shard)

    inspection = commands.add_parser("inspect", help="counts, document lengths and decoded samples of a dataset")
    inspection.add_argument("dataset", type=Path)
    inspection.add_argument("--samples", type=int, default=3)
    inspection.add_argument("--sample-tokens", type=int, default=200, help="show no more of a sample")
    inspection.add_argument("--png", type=Path, metavar="FILE", help="write the histogram of lengths")
    inspection.set_defaults(run=_inspect)
    return parser


def _cores() -> int:
    """Cores this process may use, which in a container or a batch job are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
