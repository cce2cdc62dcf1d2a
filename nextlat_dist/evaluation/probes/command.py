"""`nextlat evaluate probes`: linear probes for the tokens to come, and effective rank, exports side by side.

nextlat evaluate probes --export gpt=DIR nextlat=DIR --data data/text/validation --json FILE --pictures DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.reporting.options import integers


def add_command(kinds: Any) -> None:
    probes = kinds.add_parser("probes", help="what hidden states say about tokens 1 to 20 ahead; effective rank")
    probes.add_argument(
        "--export", nargs="+", required=True, metavar="[NAME=]DIR", help="those of one NAME are runs (seeds) of it"
    )
    probes.add_argument("--data", type=Path, required=True, help="a dataset of text that none was trained on")
    probes.add_argument("--baseline", metavar="NAME", help="what differences are to; default: the first export")
    probes.add_argument("--offsets", type=integers, default=list(range(1, 21)), metavar="1..20")
    probes.add_argument("--sequences", type=int, default=1024, help="documents: half fit the probes, half judge them")
    probes.add_argument("--length", type=int, default=256, help="tokens of each, at most")
    probes.add_argument("--steps", type=int, default=300, help="of fitting a probe")
    probes.add_argument("--batch-size", type=int, default=512, help="of a step")
    probes.add_argument("--seed", type=int, default=0)
    probes.add_argument("--json", type=Path, help="where to write the measurements")
    probes.add_argument("--pictures", type=Path, metavar="DIR", help="where to write a PNG")
    probes.set_defaults(run_command=_evaluate_probes)


def _evaluate_probes(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.probes.measure import Fitting
    from nextlat_dist.evaluation.probes.report import evaluate_probes

    evaluate_probes(
        options.export,
        options.data,
        baseline=options.baseline,
        offsets=options.offsets,
        sequences=options.sequences,
        length=options.length,
        fitting=Fitting(options.steps, options.batch_size, options.seed),
        json_path=options.json,
        picture_dir=options.pictures,
    )
