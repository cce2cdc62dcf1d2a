"""`nextlat-data shard`: its options and what it prints.

nextlat-data shard --input corpus/ --tokenizer corpus/tokenizer.model --output data --validation-fraction 0.02
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_tools.shards.shard import ShardOptions, shard
from data_tools.shards.shard_report import describe
from data_tools.text.source_options import open_source


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], inputs: argparse.ArgumentParser) -> None:
    """Add `shard` to the commands; `inputs` is the parent parser of `data_tools.text.source_options`."""
    parser = commands.add_parser(
        "shard",
        parents=[inputs],
        help="tokenise documents into shards",
        description="Tokenise documents into shards. Give the command again to go on with an interrupted run.",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--prompt-field", help="field whose tokens come first and are never predicted")
    split = parser.add_mutually_exclusive_group()
    split.add_argument("--split", choices=("train", "validation"), default="train", help="name of the one dataset")
    split.add_argument("--validation-fraction", type=float, metavar="F", help="hold out by a hash of the name")
    split.add_argument("--split-field", help="field that says train or validation")
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, default=True, help="start documents with BOS")
    parser.add_argument("--eos", action=argparse.BooleanOptionalAction, default=True, help="end documents with EOS")
    parser.add_argument("--on-invalid", choices=("replace", "skip", "fail"), default="replace", help="not UTF-8")
    parser.add_argument("--record-tokens", type=int, default=ShardOptions.record_tokens)
    parser.add_argument("--shard-tokens", type=int, default=ShardOptions.shard_tokens)
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: all cores)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset, or an unfinished run of another command, in OUTPUT"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
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
    source = open_source(options, prompt=options.prompt_field, split=options.split_field)
    for manifest in shard(source, plan):
        print(describe(manifest, plan.splits[manifest.split]))


def _cores() -> int:
    """Cores this process may use, which in a container or a batch job are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
