"""`nextlat evaluate belief`: did the latents become belief states?

nextlat evaluate belief --export gpt=DIR nextlat=DIR --data data/hmm/test --json FILE --pictures DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nextlat_dist.evaluation.exports import add_exports
from nextlat_dist.reporting.options import add_outputs


def add_command(kinds: Any) -> None:
    belief = kinds.add_parser("belief", help="are hidden states belief states? On a process whose beliefs are known")
    add_exports(belief)
    belief.add_argument("--data", type=Path, required=True, help="a test set of `nextlat-data task hmm`")
    belief.add_argument(
        "--fit-data", type=Path, metavar="DIR", help="to fit a missing p_ψ on (default: `train` next to --data)"
    )
    belief.add_argument(
        "--documents", type=int, default=200, metavar="N", help="measure on the first N documents (default: 200)"
    )
    belief.add_argument(
        "--fit-documents", type=int, default=1000, metavar="N", help="fit on the first N documents (default: 1000)"
    )
    belief.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure exact beliefs, and the same shuffled (default: yes)",
    )
    belief.add_argument(
        "--seed", type=int, default=0, help="of pairs, counterfactuals, probes and a fitted p_ψ (default: 0)"
    )
    add_outputs(belief, pictures="the page, belief.md, and its PNGs")
    belief.set_defaults(run_command=_evaluate_belief)


def _evaluate_belief(options: argparse.Namespace) -> None:
    from nextlat_dist.evaluation.belief.measure import evaluate_belief
    from nextlat_dist.reporting.publish import publish

    report = evaluate_belief(
        options.export,
        options.data,
        fit_data=options.fit_data,
        documents=options.documents,
        fit_documents=options.fit_documents,
        controls=options.controls,
        seed=options.seed,
    )
    publish(report, options.json, options.pictures)
