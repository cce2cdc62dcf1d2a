"""`nextlat-data shard` and `reshard`: their options and what they print.

nextlat-data shard --input corpus/ --tokenizer corpus/tokenizer.model --output data --validation-fraction 0.02
nextlat-data reshard adopted/ data/books --output data/all --record-tokens 32768 --shard-tokens 67108864
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_tools.options import add_boundaries, add_sizes
from data_tools.shards.reshard import ReshardOptions, reshard
from data_tools.shards.shard import ShardOptions, shard
from data_tools.shards.shard_report import describe
from data_tools.text.source_options import input_options, open_source
from nextlat_dist.reporting.console import say

SPLITS = ("train", "validation")


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_shard(commands)
    _add_reshard(commands)


def _add_shard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "shard",
        parents=[input_options()],
        help="tokenise documents into shards",
        description="Tokenise documents into shards. Give the command again to resume an interrupted run.",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="sentencepiece model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the dataset or datasets")
    parser.add_argument("--prompt-field", help="field whose tokens come first and are never predicted (default: none)")
    split = parser.add_mutually_exclusive_group()
    split.add_argument(
        "--split", choices=SPLITS, default="train", help="name of the one dataset (default: %(default)s)"
    )
    split.add_argument(
        "--validation-fraction", type=float, metavar="F", help="hold out by a hash of the name (default: nothing)"
    )
    split.add_argument("--split-field", help="field that says train or validation (default: none)")
    add_boundaries(parser)
    parser.add_argument(
        "--on-invalid",
        choices=("replace", "skip", "fail"),
        default="replace",
        help="what to do with what is not UTF-8; a line that is no document is left out by skip, else an error "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--shuffle",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mix the documents, so that a batch is not of neighbours (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --shuffle (default: %(default)s)")
    add_sizes(parser)
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (default: all cores)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset, or an unfinished run of another command, in OUTPUT"
    )
    parser.set_defaults(run=_shard)


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
        shuffle_seed=options.seed if options.shuffle else None,
    )
    source = open_source(options, prompt=options.prompt_field, split=options.split_field)
    for manifest in shard(source, plan):
        say(describe(manifest, plan.splits[manifest.split]))


def _cores() -> int:
    """Cores this process may use, which in a container or a batch job are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_reshard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("reshard", help="write datasets again, as one with records and shards of other sizes")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="directories or URLs of datasets")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the dataset")
    add_sizes(parser)
    parser.add_argument("--split", choices=SPLITS, help="of the result (default: the sources')")
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset in OUTPUT")
    parser.set_defaults(run=_reshard)


def _reshard(options: argparse.Namespace) -> None:
    plan = ReshardOptions(
        output=options.output,
        record_tokens=options.record_tokens,
        shard_tokens=options.shard_tokens,
        split=options.split,
        overwrite=options.overwrite,
    )
    say(describe(reshard(options.sources, plan), options.output))
