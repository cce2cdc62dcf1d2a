"""The paper's Path-Star run on one GPU, from nothing: does NextLat plan where its GPT twin guesses?

    python -m nextlat_dist.experiments.path_star [--minutes 9] [--seeds 1] [--output DIR] [--json FILE]
                                            [--scale gpu|tiny] [key=value]

Graphs by `nextlat-data task`, for each seed both twins by `nextlat train` with configs/paper/path_star.yaml (they
differ in objective.name alone), export, and `nextlat evaluate task`, whose table is printed. `--minutes` is for a seed:
how many steps fit is known from a short run before the real ones, never more than the config has, and both twins take
as many.

`gpt_…`, `nextlat_…`, `guess_…`    as in `nextlat evaluate task`; `…_exact_greedy` is the paper's accuracy
`steps`, `paper_steps`             that were trained, and that the config has
`steps_per_second`, `seconds`      of NextLat's short run; of the whole command

`--scale gpu` trains in bf16 (`training.precision=fp32` for the config's own), `--scale tiny` does all of it with a toy
on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nextlat_dist.config.load import load_config
from nextlat_dist.config.shipped import shipped_root
from nextlat_dist.errors import UserError
from nextlat_dist.experiments.budget import (
    Stages,
    logged,
    nextlat,
    nextlat_data,
    probe,
    start_over,
    tokens_per_step,
    train,
)
from nextlat_dist.files import CHECKPOINTS_FOLDER
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.publish import publish
from nextlat_dist.reporting.report import Report

COMMAND = "python -m nextlat_dist.experiments.path_star"
CONFIG = Path("configs/paper/path_star.yaml")
OBJECTIVES = {"gpt": "next_token", "nextlat": "nextlat"}
SAFETY = 0.93  # of the training time is planned for
# No checkpoint and no validation before the end, and the last checkpoint is waited for.
IN_A_HURRY = (
    "training.validation_interval=0",
    "training.validation_batches=2",
    "checkpoint.save_interval=0",
    "checkpoint.background=false",
)


@dataclass(frozen=True)
class PathStarScale:
    """Attributes:
    graphs: arguments of `nextlat-data task path-star`.
    overrides: of the config file.
    probe_steps: of the run that finds out the speed; the first half does not count.
    least_steps: trained however late it is.
    reserved_seconds: of a seed, for exports and scores.
    documents: test graphs that are scored.
    """

    graphs: tuple[str, ...]
    overrides: tuple[str, ...]
    probe_steps: int
    least_steps: int
    reserved_seconds: float
    documents: int


SCALES = {
    "gpu": PathStarScale(
        graphs=("--arms", "5", "--length", "5", "--nodes", "100", "--train", "200_000", "--test", "20_000"),
        overrides=("training.precision=bf16", "data.workers=2"),
        probe_steps=60,
        least_steps=200,
        reserved_seconds=60.0,
        documents=5000,
    ),
    "tiny": PathStarScale(
        graphs=("--arms", "2", "--length", "4", "--nodes", "10", "--train", "2000", "--test", "100"),
        overrides=(
            "model.num_layers=1",
            "model.hidden_size=32",
            "model.num_attention_heads=2",
            "model.vocab_size=17",
            "predictor.hidden_size=32",
            "objective.horizon=2",
            "data.sequence_length=26",
            "training.micro_batch_size=8",
            "training.global_batch_size=8",
            "training.log_interval=2",
        ),
        probe_steps=4,
        least_steps=6,
        reserved_seconds=20.0,
        documents=20,
    ),
}


def bench_path_star(
    scale: PathStarScale, config: Path, overrides: Sequence[str], output: Path, minutes: float, seeds: int
) -> Report:
    """Graphs, twins, scores, below `output`; an earlier one's are replaced."""
    if minutes <= 0 or seeds < 1:
        raise UserError(f"--minutes is {minutes} and --seeds {seeds}; give more than 0 minutes and at least 1 seed")
    start_over(output, "path_star")
    stages = Stages()
    data = output / "data"
    settings = [*IN_A_HURRY, *scale.overrides, f"data.train={data / 'train'}", f"data.validation={data / 'test'}"]
    settings += overrides
    paper_steps = load_config(config, settings).total_steps
    per_step = tokens_per_step(config, settings)
    with stages.stage("graphs"):
        nextlat_data("task", "path-star", *scale.graphs, "--output", data)
    with stages.stage("a short run, to know how many steps fit"):
        tokens_per_second, overhead = probe(config, settings, output / "probe", scale.probe_steps)
    speed = tokens_per_second / per_step
    left = 60 * minutes * seeds - stages.passed
    steps = min(paper_steps, max(scale.least_steps, steps_that_fit(scale, left / seeds, speed, overhead)))
    exports, runs = [], []
    for seed in range(seeds):
        for name, objective in OBJECTIVES.items():
            run = output / f"{name}-{seed}"
            chosen = [f"objective.name={objective}", f"training.seed={seed}", f"output_dir={run}"]
            with stages.stage(f"{name}, seed {seed}: {steps} steps"):
                train(config, [*settings, *chosen, f"training.train_tokens={steps * per_step}"])
                checkpoint = ["--checkpoint", run / CHECKPOINTS_FOLDER, "--no-verify"]
                nextlat("export", *checkpoint, "--output", run / "export")
            exports.append(f"{name}={run / 'export'}")
            runs.append({"name": name, "seed": seed, "steps": steps, **last_losses(run)})
    scores = output / "scores.json"
    with stages.stage("scores"):
        which = ["--data", data / "test", "--documents", scale.documents, "--temperature", 0]
        nextlat("evaluate", "task", "--export", *exports, *which, "--json", scores)
    scored = json.loads(scores.read_text())
    measured = {"steps": steps, "paper_steps": paper_steps, "seeds": seeds, "steps_per_second": speed}
    return Report(
        COMMAND,
        {"minutes": minutes, "graphs": list(scale.graphs), "overrides": [*scale.overrides, *overrides]},
        scored["summary"] | measured | {"seconds": stages.passed},
        scored["rows"],
        extra={"runs": runs, "stages": stages.rows},
        text=stages.table(),
    )


def steps_that_fit(scale: PathStarScale, seconds: float, speed: float, overhead: float) -> int:
    """Steps of each twin within `seconds` for a seed; GPT's are taken to be no faster than NextLat's."""
    return int(SAFETY * (seconds - scale.reserved_seconds - len(OBJECTIVES) * overhead) * speed / len(OBJECTIVES))


def last_losses(run: Path) -> dict[str, float]:
    """The last training loss, and the validation's loss of the next token."""
    lines = logged(run)
    loss = next(line["loss"] for line in reversed(lines) if "loss" in line)
    held_out = next(line["validation_next_token"] for line in reversed(lines) if "validation_next_token" in line)
    return {"loss": loss, "validation_next_token": held_out}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="for each seed, all of the command counted (default: 9)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many runs of each twin (default: 1)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/path_star"),
        help="a new folder, or that of an earlier one, whose content is replaced (default: runs/path_star)",
    )
    parser.add_argument("--json", type=Path, help="where to write the measurements (default: OUTPUT/path_star.json)")
    parser.add_argument("--config", type=Path, help=f"of the runs (default: {CONFIG})")
    parser.add_argument("--scale", choices=sorted(SCALES), default="gpu", help="tiny: a toy on a CPU (default: gpu)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    try:
        config = options.config or shipped_root() / CONFIG
        report = bench_path_star(scale, config, options.overrides, options.output, options.minutes, options.seeds)
        publish(report, options.json or options.output / "path_star.json")
    except UserError as error:
        say(f"error: {error}", error=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
