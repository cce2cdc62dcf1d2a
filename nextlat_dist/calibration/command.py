"""`nextlat calibrate`: measure what adaptive draft lengths go by, on this machine.

nextlat calibrate --export DIR --prompts FILE|DIR … --json FILE --pictures DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.reporting.options import add_outputs, integers, numbers


def add_command(commands: Any) -> None:
    shown = "(default: %(default)s)"
    calibrate = commands.add_parser("calibrate", help="measure what adaptive draft lengths go by, on this machine")
    calibrate.add_argument("--export", type=Path, required=True, help="written by `nextlat export`")
    calibrate.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="files of prompts, or folders with a file per domain"
    )
    calibrate.add_argument(
        "--temperature",
        type=numbers,
        default=[0.0, 0.6, 1.0],
        metavar="0,0.6,1",
        help="to calibrate for; decoding uses the nearest (default: 0,0.6,1)",
    )
    calibrate.add_argument("--top-k", type=int, default=0, metavar="N", help="of sampled tokens (default: 0, off)")
    calibrate.add_argument("--top-p", type=float, default=1.0, metavar="X", help="of sampled tokens (default: 1, off)")
    calibrate.add_argument(
        "--batch-size",
        type=integers,
        default=[1, 4, 16, 64, 128],
        metavar="1,4,16,64,128",
        help="prompts decoded together; 1 is always measured (default: 1,4,16,64,128)",
    )
    calibrate.add_argument("--prompts-per-domain", type=int, default=8, metavar="N", help=f"to measure with {shown}")
    calibrate.add_argument(
        "--skip", type=int, default=0, metavar="N", help=f"leave out the first prompts of each domain {shown}"
    )
    calibrate.add_argument("--max-new-tokens", type=int, default=96, metavar="N", help=f"per prompt {shown}")
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help=f"of the sampling {shown}")
    calibrate.add_argument(
        "--draft-vocabulary",
        type=int,
        metavar="N",
        help="first: draft from the N most frequent ids of --data; 0: from all (default: as it is)",
    )
    calibrate.add_argument(
        "--data", type=Path, metavar="DIR", help="the dataset that --draft-vocabulary counts ids in (default: none)"
    )
    add_outputs(calibrate, pictures="a PNG")
    calibrate.set_defaults(run_command=_calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    from nextlat_dist.calibration.calibrate import calibrate
    from nextlat_dist.reporting.publish import publish

    report = calibrate(
        options.export,
        options.prompts,
        temperatures=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        batch_sizes=options.batch_size,
        prompts_per_domain=options.prompts_per_domain,
        skip=options.skip,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        draft_vocabulary=options.draft_vocabulary,
        data=options.data,
    )
    publish(report, options.json, options.pictures)
