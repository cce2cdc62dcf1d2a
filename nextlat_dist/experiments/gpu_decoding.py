"""Self-speculative decoding on one GPU, from nothing, within a few minutes: training, calibration, speed.

    python -m nextlat_dist.experiments.gpu_decoding [--minutes 9] [--output DIR] [--json FILE]
                                               [--scale gpu|tiny] [key=value]

Text (the standard library, and the Python sources of installed packages, which no prompt is taken from), tokenizer and
shards; a model of more than 100M parameters trained by `nextlat train` for as long as the minutes allow; export,
calibration, and decoding of held-out prompts at batch size 1, for draft lengths 0 to 10 and adaptive. Prints the tables
of the commands it runs, and one of its own stages.

`speedup_…`, `sampled_…`    as in `nextlat evaluate speculative`: greedy, and at temperature 1
`draft_cost`                c: one draft step in plain steps
`verify_cost_N`             v(N): a forward over N tokens in plain steps
`parameters`, `train_tokens`, `train_seconds`, `train_tokens_per_second`, `validation_next_token`, `seconds`

How many tokens fit is known from a short run before the real one, so a slow machine trains less and ends in time.
`--scale tiny` does the same with a toy on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from nextlat_dist.files import CHECKPOINTS_FOLDER, CONFIG_FILE, EXPORT_FOLDER, SPECULATIVE_REPORT_FILE
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.publish import publish
from nextlat_dist.reporting.report import Report

COMMAND = "python -m nextlat_dist.experiments.gpu_decoding"
CONFIG = Path("configs/gpu_decoding.yaml")
SAFETY = 0.95  # of the training time is planned for


@dataclass(frozen=True)
class DecodingScale:
    """Attributes:
    overrides: of the config file.
    packages: installed ones whose sources are trained on with the standard library, if they are there.
    package_rows: how many rows come from them for each of the standard library.
    probe_steps: of the run that finds out the speed; the first half does not count.
    least_steps: trained however late it is.
    reserved_seconds: for what comes after training.
    """

    overrides: tuple[str, ...]
    packages: tuple[str, ...]
    package_rows: float
    tokenizer_bytes: int
    probe_steps: int
    least_steps: int
    reserved_seconds: float
    draft_lengths: tuple[int, ...]
    prompts_per_domain: int
    calibration_prompts: int
    max_new_tokens: int


SCALES = {
    "gpu": DecodingScale(
        overrides=(),
        packages=("torch", "transformers", "numpy", "sympy", "networkx"),
        package_rows=3.0,
        tokenizer_bytes=3_000_000,
        probe_steps=40,
        least_steps=200,
        reserved_seconds=150.0,
        draft_lengths=tuple(range(11)),
        prompts_per_domain=6,
        calibration_prompts=8,
        max_new_tokens=128,
    ),
    "tiny": DecodingScale(
        overrides=(
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.num_attention_heads=2",
            "model.vocab_size=512",
            "predictor.hidden_size=32",
            "data.sequence_length=32",
            "training.precision=fp32",
            "training.micro_batch_size=2",
            "training.global_batch_size=4",
            "training.log_interval=2",
            "training.validation_batches=1",
        ),
        packages=("yaml",),
        package_rows=1.0,
        tokenizer_bytes=200_000,
        probe_steps=4,
        least_steps=6,
        reserved_seconds=20.0,
        draft_lengths=(0, 1, 3),
        prompts_per_domain=1,
        calibration_prompts=1,
        max_new_tokens=12,
    ),
}


def bench_gpu_decoding(
    scale: DecodingScale, config: Path, overrides: Sequence[str], output: Path, minutes: float, draft_vocabulary: int
) -> Report:
    """Data, training, export, calibration, decoding, below `output`; an earlier one's are replaced."""
    start_over(output, "gpu_decoding")
    stages = Stages()
    settings = [*scale.overrides, *overrides]
    run, export, prompts = output / "run", output / EXPORT_FOLDER, output / "prompts"
    with stages.stage("text, tokenizer, shards"):
        sources = make_data(scale, output, load_config(config, settings).model.vocab_size)
        settings += ["data.train=null", f"data.sources={json.dumps(sources)}"]
        settings += [f"data.validation={output / 'stdlib/validation'}", "checkpoint.background=false"]
    with stages.stage("a short run, to know how many tokens fit"):
        speed, overhead = probe(config, settings, output / "probe", scale.probe_steps)
    tokens = tokens_that_fit(scale, config, settings, speed, 60 * minutes - stages.passed - overhead)
    with stages.stage(f"training on {tokens:,} tokens"):
        # A tenth to warm up, at most, and a fifth to cool down.
        schedule = [f"schedule.warmup_tokens={min(tokens // 10, 1_000_000)}", f"schedule.decay_tokens={tokens // 5}"]
        train(config, [*settings, *schedule, f"training.train_tokens={tokens}", f"output_dir={run}"])
    with stages.stage("export"):
        chosen = ["--no-verify", "--draft-vocabulary", draft_vocabulary]
        nextlat("export", "--checkpoint", run / CHECKPOINTS_FOLDER, "--output", export, *chosen)
    measured = ["--export", export, "--prompts", prompts, "--temperature", "0,1", "--batch-size", 1]
    measured += ["--max-new-tokens", scale.max_new_tokens, "--pictures", output]
    with stages.stage("calibration"):
        own = ["--prompts-per-domain", scale.calibration_prompts, "--skip", scale.prompts_per_domain]
        nextlat("calibrate", *measured, *own, "--json", output / "calibration.json")
    with stages.stage("decoding"):
        lengths = ",".join(map(str, (*scale.draft_lengths, "adaptive")))
        own = ["--prompts-per-domain", scale.prompts_per_domain, "--draft-length", lengths]
        nextlat("evaluate", "speculative", *measured, *own, "--json", output / SPECULATIVE_REPORT_FILE)
    decoding = json.loads((output / SPECULATIVE_REPORT_FILE).read_text())
    (costs,) = decoding["costs"]  # of one export at one batch size
    return Report(
        COMMAND,
        {
            "minutes": minutes,
            "draft_vocabulary": draft_vocabulary,
            "overrides": [*scale.overrides, *overrides],
        },
        trained(run) | {"seconds": stages.passed} | decoding["summary"] | named_costs(costs),
        decoding["rows"],
        extra={"stages": stages.rows, "costs": decoding["costs"]},
        text=stages.table(),
    )


def make_data(scale: DecodingScale, output: Path, vocab_size: int) -> list[dict[str, Any]]:
    """Documents, held-out prompts, tokenizer and shards below `output`; returns `data.sources`."""
    text, tokenizer = str(output / "stdlib.jsonl"), str(output / "tokenizer.model")
    nextlat_data("stdlib", "--output", str(output))
    size = ["--vocab-size", str(vocab_size), "--input-bytes", str(scale.tokenizer_bytes)]
    nextlat_data("tokenizer", "--input", text, "--output", tokenizer, *size)
    shard = ["shard", "--tokenizer", tokenizer, "--record-tokens", "8192"]
    nextlat_data(*shard, "--input", text, "--output", str(output / "stdlib"), "--split-field", "split")
    sources: list[dict[str, Any]] = [{"name": "stdlib", "path": str(output / "stdlib/train"), "weight": 1.0}]
    folders = [folder for package in scale.packages for folder in package_folders(package)]
    if folders:
        path = str(output / "packages")
        nextlat_data(*shard, "--input", *folders, "--glob", "*.py", "--output", path, "--split", "train")
        sources.append({"name": "packages", "path": path, "weight": scale.package_rows})
    return sources


def package_folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or []) if spec is not None else []


def tokens_that_fit(scale: DecodingScale, config: Path, settings: Sequence[str], speed: float, seconds: float) -> int:
    """Whole steps in `seconds`, of which some are reserved for what follows."""
    per_step = tokens_per_step(config, settings)
    steps = int(SAFETY * (seconds - scale.reserved_seconds) * speed / per_step)
    return max(steps, scale.least_steps) * per_step


def trained(run: Path) -> dict[str, int | float]:
    """Parameters without the predictor, and what training took and reached."""
    from nextlat_dist.plan.counting import parameter_counts

    lines = logged(run)
    steps = [line for line in lines if "loss" in line]
    (validation,) = (line for line in lines if "validation_loss" in line)
    tokens, seconds = steps[-1]["tokens"], steps[-1]["time"] - steps[0]["time"]
    return {
        "parameters": parameter_counts(load_config(run / CONFIG_FILE))["base"],
        "train_tokens": tokens,
        "train_seconds": seconds,
        "train_tokens_per_second": (tokens - steps[0]["tokens"]) / seconds,
        "validation_next_token": validation["validation_next_token"],
    }


def named_costs(costs: Mapping[str, Any]) -> dict[str, float]:
    """c and v(n) by the names of this command."""
    named = {"plain_step_seconds": costs["plain_step_seconds"], "draft_cost": costs["draft"]}
    return named | {f"verify_cost_{n}": cost for n, cost in costs["verify"].items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="from the start of the command to its end (default: 9)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/gpu_decoding"),
        help="a new folder, or that of an earlier one, whose content is replaced (default: runs/gpu_decoding)",
    )
    parser.add_argument("--json", type=Path, help="where to write the measurements (default: OUTPUT/gpu_decoding.json)")
    parser.add_argument("--config", type=Path, help=f"of the run (default: {CONFIG})")
    parser.add_argument("--scale", choices=sorted(SCALES), default="gpu", help="tiny: a toy on a CPU (default: gpu)")
    parser.add_argument(
        "--draft-vocabulary", type=int, default=0, metavar="N", help="draft from the N most frequent ids (default: all)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_args(arguments)
    scale, config = SCALES[options.scale], options.config or shipped_root() / CONFIG
    try:
        report = bench_gpu_decoding(
            scale, config, options.overrides, options.output, options.minutes, options.draft_vocabulary
        )
        publish(report, options.json or options.output / "gpu_decoding.json")
    except UserError as error:
        say(f"error: {error}", error=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
