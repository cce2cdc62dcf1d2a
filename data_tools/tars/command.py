"""`nextlat-data index`: its options and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_tools.options import add_boundaries
from data_tools.shards.shard_report import describe
from data_tools.tars.index import find_tars, index
from nextlat_dist.data.shard_format import MembersEntry
from nextlat_dist.data.tokenizer import Tokenizer
from nextlat_dist.errors import UserError
from nextlat_dist.reporting.console import say


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("index", help="adopt existing WebDataset tars of text or tokens, without copying")
    parser.add_argument("tars", nargs="+", metavar="DIR|TAR", help="folders, tars, URLs of tars, a-{000..099}.tar")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="sentencepiece model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of the dataset (default: where the tars are)")
    member = parser.add_mutually_exclusive_group()
    member.add_argument("--text-member", metavar="EXT", help="of the text (default: txt, with --text-field json)")
    member.add_argument("--token-member", metavar="EXT", help="of .npy token ids of any integer type (default: text)")
    parser.add_argument(
        "--text-field", metavar="F", help="the member is JSON and the text is this field of it (default: plain text)"
    )
    parser.add_argument(
        "--split", choices=("train", "validation"), default="train", help="name of the dataset (default: %(default)s)"
    )
    add_boundaries(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.token_member is not None and options.text_field is not None:
        raise UserError("--text-field does not go with --token-member; tokens have no fields")
    if options.token_member is not None:
        members = MembersEntry("tokens", _extension(options.token_member))
    else:
        default = "txt" if options.text_field is None else "json"
        members = MembersEntry("text", _extension(options.text_member or default), options.text_field)
    tokenizer = Tokenizer(options.tokenizer)
    tars = find_tars(options.tars, options.output)
    manifest = index(tars, tokenizer, members, split=options.split, bos=options.bos, eos=options.eos)
    say(describe(manifest, tars.output))
    ignored = manifest.report["ignored_members"]
    if ignored:
        say(f"  other members, not read: {', '.join(f'{count:,} {name}' for name, count in ignored.items())}")
    if tars.storage.url != str(tars.output):
        say(f"  copy the files in {tars.output} to {tars.storage.url}, next to the tars, and open the dataset there")


def _extension(given: str) -> str:
    return given.lstrip(".").lower()
