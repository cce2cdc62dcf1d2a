"""`nextlat fit-drafter`: a latent predictor for the base of an export, whatever objective that was trained with.

nextlat fit-drafter --model DIR --data DATASET --output DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    shown = "(default: %(default)s)"
    fit = commands.add_parser("fit-drafter", help="fit a latent predictor to the base of an export")
    fit.add_argument("--model", type=Path, required=True, metavar="DIR", help="an export, which stays as it is")
    fit.add_argument("--data", required=True, metavar="DATASET", help="folder or URL, written by `nextlat-data`")
    fit.add_argument("--output", type=Path, required=True, help="base and drafter; an older export there is replaced")
    fit.add_argument("--steps", type=int, default=600, metavar="N", help=f"of AdamW {shown}")
    fit.add_argument("--rows", type=int, default=2, metavar="N", help=f"per step {shown}")
    fit.add_argument("--length", type=int, metavar="N", help="tokens of a row (default: 256, or the model's context)")
    fit.add_argument(
        "--horizon", type=int, metavar="N", help="steps ahead (default: as its predictor was trained, 2 if it has none)"
    )
    fit.add_argument(
        "--width",
        type=int,
        metavar="N",
        help="of a new predictor (default: its own, or twice the hidden size)",
    )
    fit.add_argument(
        "--fresh", action="store_true", help="start from scratch (default: with the export's own predictor)"
    )
    fit.add_argument("--lr", type=float, default=2e-3, metavar="X", help=f"highest learning rate {shown}")
    fit.add_argument("--seed", type=int, default=0, metavar="N", help=f"of weights and order of rows {shown}")
    fit.set_defaults(run_command=_fit)


def _fit(options: argparse.Namespace) -> None:
    from nextlat_dist.fitting.drafter import fit_drafter
    from nextlat_dist.reporting.console import say

    report = fit_drafter(
        options.model,
        options.data,
        options.output,
        steps=options.steps,
        rows=options.rows,
        length=options.length,
        horizon=options.horizon,
        width=options.width,
        fresh=options.fresh,
        lr=options.lr,
        seed=options.seed,
    )
    say("\n".join(f"{key:12} {value}" for key, value in report["fitted_drafter"].items()))
