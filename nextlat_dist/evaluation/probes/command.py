"""`nextlat evaluate probes`: linear probes for the tokens to come, and effective rank, exports side by side.

nextlat evaluate probes --export gpt=DIR nextlat=DIR --data data/text/validation --json FILE --pictures DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.exports import add_exports
from nextlat_dist.reporting.options import add_outputs, integers


def add_command(kinds: Any) -> None:
    probes = kinds.add_parser("probes", help="what hidden states say about tokens 1 to 20 ahead; effective rank")
    add_exports(probes)
    probes.add_argument("--data", type=Path, required=True, help="a dataset of text that none was trained on")
    probes.add_argument("--baseline", metavar="NAME", help="what differences are to (default: the first export)")
    probes.add_argument(
        "--offsets", type=integers, default=list(range(1, 21)), metavar="1..20", help="tokens ahead (default: 1..20)"
    )
    probes.add_argument(
        "--sequences",
        type=int,
        default=1024,
        metavar="N",
        help="documents: half fit the probes, half judge them (default: 1024)",
    )
    probes.add_argument("--length", type=int, default=256, metavar="N", help="tokens of each, at most (default: 256)")
    probes.add_argument("--steps", type=int, default=300, metavar="N", help="of fitting a probe (default: 300)")
    probes.add_argument("--batch-size", type=int, default=512, metavar="N", help="of a step (default: 512)")
    probes.add_argument("--seed", type=int, default=0, help="of the batches of every step (default: 0)")
    add_outputs(probes, pictures="a PNG")
    probes.set_defaults(run_command=_evaluate_probes)


def _evaluate_probes(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.probes import measure
    from nextlat_dist.evaluation.probes.linear_probes import Fitting
    from nextlat_dist.reporting.publish import publish

    report = measure.evaluate_probes(
        options.export,
        options.data,
        baseline=options.baseline,
        offsets=options.offsets,
        sequences=options.sequences,
        length=options.length,
        fitting=Fitting(options.steps, options.batch_size, options.seed),
    )
    publish(report, options.json, options.pictures)
