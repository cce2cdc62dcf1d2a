"""`nextlat checkpoint`: what a run has saved, whether it is whole, and what may go.

    nextlat checkpoint list    runs/NAME/checkpoints
    nextlat checkpoint verify  runs/NAME/checkpoints          (all of them, or one)
    nextlat checkpoint prune   runs/NAME/checkpoints --keep-last 2 --keep-every 1000
    nextlat checkpoint reshape runs/NAME/checkpoints --output DIR      (one file per kind, for copying or another tool)

A resume reads any layout by itself; `reshape` is for files that leave the run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.files import CONFIG_FILE
from nextlat_dist.reporting.console import say


def add_command(commands: Any) -> None:
    checkpoint = commands.add_parser("checkpoint", help="list, verify, prune or reshape the checkpoints of a run")
    kinds = checkpoint.add_subparsers(required=True, metavar="WHAT")
    for name, run, text in (
        ("list", _list, "what is there"),
        ("verify", _verify, "check every byte; exit status 1 when anything is wrong"),
        ("prune", _prune, "delete all but the newest and every so many"),
        ("reshape", _reshape, "write one checkpoint as that of a single rank"),
    ):
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("path", type=Path, help="a run's directory of checkpoints, or one checkpoint")
        kind.set_defaults(run_command=run)
        if name == "prune":
            kind.add_argument("--keep-last", type=int, required=True, help="newest checkpoints to keep, at least 1")
            kind.add_argument(
                "--keep-every", type=int, default=0, metavar="STEPS", help="keep multiples of this step (default: none)"
            )
        if name == "reshape":
            kind.add_argument("--output", type=Path, required=True, help="directory for the new checkpoint")


def _found(path: Path) -> list[Path]:
    """The checkpoint that `path` is, or all committed ones in it, oldest first."""
    from nextlat_dist.checkpoint.commit import committed, find_checkpoint, has_manifest

    if has_manifest(path):
        return [path]
    found = committed(path)
    if not found:
        find_checkpoint(path)  # what is there may be half-written: it says so
        raise UserError(f"{path} holds no checkpoint; name a run's directory of checkpoints or one of them")
    return found


def _list(options: argparse.Namespace) -> None:
    from nextlat_dist.checkpoint.commit import LATEST, UNCOMMITTED, read_manifest

    found = _found(options.path)
    pointer, wrong = options.path / LATEST, 0
    try:
        latest = pointer.read_text(errors="replace").strip()
    except OSError:  # none there, or `find_checkpoint` says more
        latest = ""
    say(f"{'checkpoint':<16}{'GB':>10}  {'saved by':<48}")
    for checkpoint in found:
        try:
            manifest = read_manifest(checkpoint)
        except UserError as error:
            wrong += 1
            say(f"{checkpoint.name}: {error}")
            continue
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        topology = manifest["topology"]
        layout = "tensor {tensor} x pipeline {pipeline} x data {data}, ZeRO {zero_stage}".format(**topology)
        say(f"{checkpoint.name:<16}{size / 1e9:>10.3f}  {layout:<46}{'latest' if checkpoint.name == latest else ''}")
    for abandoned in sorted(options.path.glob(f"*{UNCOMMITTED}")):
        say(f"{abandoned.name}: never committed; the next save removes it")
    if wrong:
        sys.exit(1)


def _verify(options: argparse.Namespace) -> None:
    from nextlat_dist.checkpoint.commit import find_checkpoint, verify

    wrong = 0
    for checkpoint in _found(options.path):
        try:
            manifest = verify(checkpoint)
        except UserError as error:
            wrong += 1
            say(f"{checkpoint.name}: {error}")
        else:
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            say(f"{checkpoint.name}: {len(manifest['files'])} files, {size / 1e9:.3f} GB, whole")
    try:
        find_checkpoint(options.path)
    except UserError as error:
        wrong += 1
        say(str(error))
    if wrong:
        sys.exit(1)


def _prune(options: argparse.Namespace) -> None:
    from nextlat_dist.checkpoint.commit import LATEST, find_checkpoint, prune, verify

    if options.keep_last < 1 or options.keep_every < 0:
        raise UserError(
            f"--keep-last is {options.keep_last} and --keep-every {options.keep_every}; the first must be at least 1, "
            "the second not negative"
        )
    if not os.path.isfile(options.path / LATEST):
        raise UserError(f"{options.path} has no file {LATEST!r}: it is no directory of checkpoints; name one")
    newest = find_checkpoint(options.path)
    assert newest is not None
    verify(newest)  # the others may go only when this one is whole
    before = _found(options.path)
    # A save that is not committed may be under way.
    refused = prune(options.path, options.keep_last, options.keep_every, abandoned=False)
    for checkpoint in before:
        if checkpoint.name not in refused:
            say(f"{checkpoint.name}: {'kept' if checkpoint.exists() else 'deleted'}")
    for name, reason in refused.items():
        say(f"{name}: cannot be deleted ({reason})", error=True)
    if refused:
        raise UserError(f"not all could be deleted of {options.path}; repair the access, then run this again")


def _reshape(options: argparse.Namespace) -> None:
    import yaml

    from nextlat_dist.checkpoint.commit import find_checkpoint, read_manifest, verify, write_alone
    from nextlat_dist.checkpoint.rng import rng_file
    from nextlat_dist.checkpoint.tensors import (
        MOMENTS,
        WEIGHT,
        Fragment,
        TensorReader,
        rank_name,
        write_fragments,
    )
    from nextlat_dist.config.load import config_from_dict
    from nextlat_dist.model.sharding import sharding_rules

    source = find_checkpoint(options.path)
    if source is None:
        raise UserError(f"{options.path} holds no checkpoint; name a run's directory of checkpoints or one of them")
    if os.path.lexists(options.output) and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UserError(f"--output {options.output} is not an empty directory; name a new one")
    verify(source)
    manifest = read_manifest(source)

    rules = sharding_rules(config_from_dict(yaml.safe_load((source / CONFIG_FILE).read_text())))

    def write(directory: Path) -> list[str]:
        with TensorReader(source, rules=rules) as reader:
            fragments = []
            for name in reader.names:
                values = {key: reader.full(name, key) for key in (WEIGHT, *MOMENTS)}
                flat = {key: value.flatten() for key, value in values.items()}
                fragments.append(Fragment(name, tuple(values[WEIGHT].shape), 0, flat))
        names = write_fragments(directory, fragments, rank_name(0, 0, 0))
        for name in manifest["files"]:
            if "/" not in name or name == rng_file(0):
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, directory / name)
                names.append(name)
        return names

    topology = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 0}
    target = write_alone(options.output, manifest["step"], {"topology": topology}, write)
    say(json.dumps({"checkpoint": str(target), "step": manifest["step"]}))
