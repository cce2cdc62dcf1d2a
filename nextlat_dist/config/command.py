"""`nextlat init`: a commented YAML file to begin with. `nextlat configs`: what is shipped, and copies of it.

nextlat init --preset quickstart --output run.yaml
nextlat configs
nextlat configs cpu/hmm --output hmm.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.reporting.console import say


def add_command(commands: Any) -> None:
    init = commands.add_parser("init", help="write a YAML file with every key of a run, each with a comment")
    init.add_argument(
        "--preset", metavar="NAME", help="a shipped run, such as quickstart or fineweb (default: the schema's defaults)"
    )
    init.add_argument("--output", type=Path, metavar="FILE", help="a new file (default: printed)")
    init.add_argument("overrides", nargs="*", metavar="key=value", help="as for train")
    init.set_defaults(run_command=_init)
    configs = commands.add_parser("configs", help="list the shipped configs and launch scripts, or copy one")
    configs.add_argument("name", nargs="?", metavar="NAME", help="a file or folder of the list (default: list them)")
    configs.add_argument("--output", type=Path, metavar="FILE", help="copy it here; a new file (default: printed)")
    configs.set_defaults(run_command=_configs)


def _init(options: argparse.Namespace) -> None:
    from nextlat_dist.config.init import commented_yaml, starting_config, write_config

    text = commented_yaml(starting_config(options.preset, options.overrides), options.preset)
    if options.output is None:
        say(text.rstrip())
    else:
        write_config(options.output, text)
        say(f"written: {options.output}; nextlat train --config {options.output} --dry-run checks it", error=True)


def _configs(options: argparse.Namespace) -> None:
    from nextlat_dist.config.shipped import copy_shipped, first_comment, shipped_files, shipped_path
    from nextlat_dist.errors import UserError

    if options.name is None:
        if options.output is not None:
            raise UserError(f"--output {options.output} needs the NAME of what to copy; `nextlat configs` lists them")
        files = shipped_files()
        width = max(map(len, files))
        say("\n".join(f"{name:{width}}  {first_comment(path)}".rstrip() for name, path in files.items()))
    elif options.output is not None:
        copy_shipped(options.name, options.output)
    else:
        path = shipped_path(options.name)
        if path.is_dir():
            raise UserError(f"{options.name} is a folder of configs, it must be copied; add --output DIR")
        say(path.read_text(encoding="utf-8").rstrip())
