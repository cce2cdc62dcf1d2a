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

import sys
from collections.abc import Sequence

from data_tools import inspect, mix_preview, task_command, verify
from data_tools.shards import command as shards
from data_tools.tars import command as tars
from data_tools.text import command as text
from nextlat_dist.errors import UserError, refused_path
from nextlat_dist.reporting.console import say, say_error
from nextlat_dist.reporting.options import CommandParser

COMMANDS = (text, shards, tars, verify, inspect, mix_preview, task_command)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except (UserError, OSError) as found:
        error = found if isinstance(found, UserError) else refused_path(found, arguments or sys.argv[1:])
        if error is None:
            raise
        say_error(parser.in_flags(str(error)))
        return 2
    except KeyboardInterrupt:
        say("interrupted", error=True)
        return 130


def _parser() -> CommandParser:
    parser = CommandParser(prog="nextlat-data", description="From text to shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for package in COMMANDS:
        package.add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
