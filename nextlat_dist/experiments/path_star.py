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
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextlat_dist.config.load import load_config
from nextlat_dist.errors import UserError
from nextlat_dist.experiments.gpu_decoding import COLUMNS, Stages, data_tools, logged, train
from nextlat_dist.reporting import report

COMMAND = "python -m nextlat_dist.experiments.path_star"
CONFIG = Path("configs/paper/path_star.yaml")
OBJECTIVES = {"gpt": "next_token", "nextlat": "nextlat"}
SAFETY = 0.93  # of the training time is planned for
# Nothing is saved or judged on the way, and what is written at the end is waited for.
IN_A_HURRY = (
    "training.validation_interval=0",
    "training.validation_batches=2",
    "checkpoint.save_interval=0",
    "checkpoint.background=false",
)


@dataclass(frozen=True)
class Scale:
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
    "gpu": Scale(
        graphs=("--arms", "5", "--length", "5", "--nodes", "100", "--train", "200_000", "--test", "20_000"),
        overrides=("training.precision=bf16", "data.workers=2"),
        probe_steps=60,
        least_steps=200,
        reserved_seconds=60.0,
        documents=5000,
    ),
    "tiny": Scale(
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
    scale: Scale, config: Path, overrides: Sequence[str], output: Path, minutes: float, seeds: int
) -> dict[str, Any]:
    """The content of the JSON file. `output` is filled anew."""
    from nextlat_dist.evaluation.tasks.report import evaluate_task
    from nextlat_dist.huggingface.export import export_checkpoint

    if minutes <= 0 or seeds < 1:
        raise UserError(f"--minutes is {minutes} and --seeds {seeds}; give more than 0 minutes and at least 1 seed")
    shutil.rmtree(output, ignore_errors=True)
    stages = Stages()
    data = output / "data"
    settings = [*IN_A_HURRY, *scale.overrides, f"data.train={data / 'train'}", f"data.validation={data / 'test'}"]
    settings += overrides
    paper_steps = load_config(config, settings).total_steps
    with stages.stage("graphs"):
        data_tools("task", "path-star", *scale.graphs, "--output", str(data))
    with stages.stage("a short run, to know how many steps fit"):
        speed, overhead = probe(scale, config, settings, output / "probe")
    left = 60 * minutes * seeds - stages.passed
    steps = min(paper_steps, max(scale.least_steps, steps_that_fit(scale, left / seeds, speed, overhead)))
    exports, runs = [], []
    for seed in range(seeds):
        for name, objective in OBJECTIVES.items():
            run = output / f"{name}-{seed}"
            chosen = [f"objective.name={objective}", f"training.seed={seed}", f"output_dir={run}"]
            with stages.stage(f"{name}, seed {seed}: {steps} steps"):
                train_steps(config, [*settings, *chosen], steps)
                export_checkpoint(run / "checkpoints", run / "export", check_logits=False)
            exports.append(f"{name}={run / 'export'}")
            runs.append({"name": name, "seed": seed, "steps": steps, **last_losses(run)})
    with stages.stage("scores"):
        scored = evaluate_task(exports, data / "test", documents=scale.documents, temperatures=(0.0,))
    print(report.table(COLUMNS, stages.rows))
    summary = scored["summary"] | {
        "steps": steps,
        "paper_steps": paper_steps,
        "seeds": seeds,
        "steps_per_second": speed,
        "seconds": stages.passed,
    }
    options = {"minutes": minutes, "graphs": list(scale.graphs), "overrides": [*scale.overrides, *overrides]}
    content = report.envelope(COMMAND, options, summary, scored["rows"])
    return content | {"runs": runs, "stages": stages.rows}


def train_steps(config: Path, settings: Sequence[str], steps: int, *more: str) -> None:
    per_step = load_config(config, list(settings)).tokens_per_step
    train(config, [*settings, f"training.train_tokens={steps * per_step}", *more])


def probe(scale: Scale, config: Path, settings: Sequence[str], output: Path) -> tuple[float, float]:
    """(steps per second of NextLat, seconds that a run takes beside its steps)."""
    per_step = load_config(config, list(settings)).tokens_per_step
    started = time.monotonic()
    train_steps(config, [*settings, f"output_dir={output}"], scale.probe_steps, "training.log_interval=1")
    wall = time.monotonic() - started
    rates = [line["tokens_per_second"] for line in logged(output) if "loss" in line][scale.probe_steps // 2 :]
    shutil.rmtree(output)
    speed = len(rates) / sum(per_step / rate for rate in rates)
    return speed, max(0.0, wall - scale.probe_steps / speed)


def steps_that_fit(scale: Scale, seconds: float, speed: float, overhead: float) -> int:
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
    parser.add_argument("--minutes", type=float, default=9.0, help="for each seed, all of the command counted")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/path_star"), help="replaced if it exists")
    parser.add_argument("--json", type=Path, help="default: path_star.json in --output")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--scale", choices=sorted(SCALES), default="gpu")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    try:
        content = bench_path_star(
            scale, options.config, options.overrides, options.output, options.minutes, options.seeds
        )
        report.write_json(options.json or options.output / "path_star.json", content)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
