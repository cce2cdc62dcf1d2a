"""`nextlat`: parses, calls, prints.

    nextlat train --config configs/quickstart.yaml [key=value …] [--dry-run]
    nextlat export --checkpoint runs/NAME/checkpoints --output DIR

A user's mistake is one sentence on stderr and exit status 2. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from nextlat_dist.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        status = 0
    except UserError as error:
        # Every rank fails alike; one of them speaks.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nextlat", description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model; start it with a script in launch/ for several ranks")
    train.add_argument("--config", type=Path, required=True, help="YAML file; see configs/")
    train.add_argument("--dry-run", action="store_true", help="check and describe the run, build nothing")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, such as training.seed=7")
    train.set_defaults(run=_train)

    export = commands.add_parser("export", help="write a checkpoint in Hugging Face layout")
    export.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a directory of checkpoints")
    export.add_argument("--output", type=Path, required=True)
    export.add_argument("--dtype", choices=["fp32", "bf16"], help="default: the precision of the run")
    export.add_argument("--no-verify", action="store_true", help="skip comparing logits with the training forward pass")
    export.set_defaults(run=_export)
    return parser


def _train(options: argparse.Namespace) -> None:
    from nextlat_dist.config.load import load_config

    config = load_config(options.config, options.overrides)
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    from nextlat_dist.training.run import dry_run, train

    if options.dry_run:
        print(dry_run(config))
        return
    from nextlat_dist.parallel.dims import shutdown

    train(config)
    shutdown()


def _export(options: argparse.Namespace) -> None:
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    from nextlat_dist.export.huggingface import export_checkpoint

    report = export_checkpoint(
        options.checkpoint, options.output, dtype=options.dtype, check_logits=not options.no_verify
    )
    for key, value in report.items():
        print(f"{key:24} {value}")


if __name__ == "__main__":
    sys.exit(main())
