"""`nextlat export`: write a checkpoint in Hugging Face layout.

nextlat export --checkpoint runs/NAME/checkpoints --output DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    export = commands.add_parser("export", help="write a checkpoint in Hugging Face layout")
    export.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a directory of checkpoints")
    export.add_argument("--output", type=Path, required=True, help="the export; an older export there is replaced")
    export.add_argument("--dtype", choices=["fp32", "bf16"], help="of the weights (default: the precision of the run)")
    export.add_argument(
        "--no-verify",
        action="store_true",
        help="skip comparing logits with the training forward pass (default: compare)",
    )
    export.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="keep sentencepiece's file alone, for a tokenizer that has no Hugging Face form with the same ids "
        "(default: write that form, compared on raw text)",
    )
    export.add_argument(
        "--draft-vocabulary",
        type=int,
        default=0,
        metavar="N",
        help="draft from the N most frequent ids (default: %(default)s, from all)",
    )
    export.add_argument(
        "--allow-import",
        action="append",
        default=[],
        metavar="my_module:MyEntry",
        help="import the run's objective or predictor of that name; may be repeated (default: import none)",
    )
    export.set_defaults(run_command=_export)


def _export(options: argparse.Namespace) -> None:
    from nextlat_dist.config.entries import OBJECTIVES, PREDICTORS
    from nextlat_dist.huggingface.export import export_checkpoint
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda
    from nextlat_dist.reporting.console import say

    use_cpu_where_no_cuda()
    quiet_third_parties()
    for name in options.allow_import:
        OBJECTIVES.allow(name)
        PREDICTORS.allow(name)
    report = export_checkpoint(
        options.checkpoint,
        options.output,
        dtype=options.dtype,
        check_logits=not options.no_verify,
        draft_vocabulary=options.draft_vocabulary,
        tokenizer_files=not options.no_tokenizer,
    )
    say("\n".join(f"{key:24} {value}" for key, value in report.items()))
