"""What self-speculative decoding buys on one GPU, from nothing, within a few minutes.

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
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools import cli as data_cli
from nextlat_dist.config.load import load_config
from nextlat_dist.errors import UserError
from nextlat_dist.reporting import report
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.publish import publish

COMMAND = "python -m nextlat_dist.experiments.gpu_decoding"
CONFIG = Path("configs/gpu_decoding.yaml")
COLUMNS = {"stage": "{stage}", "seconds": "{seconds:.1f}"}
SAFETY = 0.95  # of the training time is planned for


@dataclass(frozen=True)
class Scale:
    """Attributes:
    overrides: of the config file.
    packages: installed ones whose sources are trained on beside the standard library, if they are there.
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
    "gpu": Scale(
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
    "tiny": Scale(
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


@dataclass
class Stages:
    """What took how long."""

    started: float = field(default_factory=time.monotonic)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> float:
        return time.monotonic() - self.started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"[{self.passed:.0f} s] {name}", file=sys.stderr, flush=True)
        started = self.passed
        yield
        self.rows.append({"stage": name, "seconds": self.passed - started})


def bench_gpu_decoding(
    scale: Scale, config: Path, overrides: Sequence[str], output: Path, minutes: float, draft_vocabulary: int
) -> dict[str, Any]:
    """The content of the JSON file. `output` is filled anew."""
    from nextlat_dist.calibration.calibrate import calibrate
    from nextlat_dist.evaluation.speculative.measure import measure, report_of
    from nextlat_dist.evaluation.speculative.options import Options
    from nextlat_dist.evaluation.speculative.records import NEXTLAT
    from nextlat_dist.huggingface.export import export_checkpoint

    shutil.rmtree(output, ignore_errors=True)
    stages = Stages()
    settings = [*scale.overrides, *overrides]
    with stages.stage("text, tokenizer, shards"):
        sources = make_data(scale, output, load_config(config, settings).model.vocab_size)
        settings += ["data.train=null", f"data.sources={json.dumps(sources)}"]
        settings += [f"data.validation={output / 'stdlib/validation'}", "checkpoint.background=false"]
    with stages.stage("a short run, to know how many tokens fit"):
        speed, overhead = probe(scale, config, settings, output / "probe")
    tokens = tokens_that_fit(scale, config, settings, speed, 60 * minutes - stages.passed - overhead)
    with stages.stage(f"training on {tokens:,} tokens"):
        # A tenth to warm up, at most, and a fifth to cool down.
        schedule = [f"schedule.warmup_tokens={min(tokens // 10, 1_000_000)}", f"schedule.decay_tokens={tokens // 5}"]
        run = output / "run"
        train(config, [*settings, *schedule, f"training.train_tokens={tokens}", f"output_dir={run}"])
    with stages.stage("export"):
        export_checkpoint(run / "checkpoints", output / "export", check_logits=False, draft_vocabulary=draft_vocabulary)
    prompts = [output / "prompts"]
    with stages.stage("calibration"):
        calibrate(
            output / "export",
            prompts,
            temperatures=(0.0, 1.0),
            batch_sizes=(1,),
            prompts_per_domain=scale.calibration_prompts,
            skip=scale.prompts_per_domain,
            max_new_tokens=scale.max_new_tokens,
            json_path=output / "calibration.json",
            picture_dir=output,
        )
    with stages.stage("decoding"):
        chosen = Options(
            draft_lengths=(*scale.draft_lengths, "adaptive"),
            max_new_tokens=scale.max_new_tokens,
            prompts_per_domain=scale.prompts_per_domain,
        )
        measured = measure({NEXTLAT: output / "export"}, prompts, chosen)
        decoding = report_of(measured)
        publish(decoding, output / "speculative.json", output)
    say(report.table(COLUMNS, stages.rows))
    (costs,) = measured.costs  # of one export at one batch size
    summary = trained(run) | {"seconds": stages.passed} | dict(decoding.summary) | costs.steps.named()
    described = {
        "minutes": minutes,
        "draft_vocabulary": draft_vocabulary,
        "overrides": [*scale.overrides, *overrides],
    }
    content = report.envelope(COMMAND, described, summary, decoding.rows)
    return content | {"stages": stages.rows, "costs": decoding.extra["costs"]}


def make_data(scale: Scale, output: Path, vocab_size: int) -> list[dict[str, Any]]:
    """Documents, held-out prompts, tokenizer and shards below `output`; returns `data.sources`."""
    text, tokenizer = str(output / "stdlib.jsonl"), str(output / "tokenizer.model")
    data_tools("stdlib", "--output", str(output))
    size = ["--vocab-size", str(vocab_size), "--input-bytes", str(scale.tokenizer_bytes)]
    data_tools("tokenizer", "--input", text, "--output", tokenizer, *size)
    shard = ["shard", "--tokenizer", tokenizer, "--record-tokens", "8192"]
    data_tools(*shard, "--input", text, "--output", str(output / "stdlib"), "--split-field", "split")
    sources: list[dict[str, Any]] = [{"name": "stdlib", "path": str(output / "stdlib/train"), "weight": 1.0}]
    folders = [folder for package in scale.packages for folder in package_folders(package)]
    if folders:
        path = str(output / "packages")
        data_tools(*shard, "--input", *folders, "--glob", "*.py", "--output", path, "--split", "train")
        sources.append({"name": "packages", "path": path, "weight": scale.package_rows})
    return sources


def package_folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return list(spec.submodule_search_locations or []) if spec is not None else []


def data_tools(*arguments: str) -> None:
    if data_cli.main(arguments) != 0:
        raise UserError(f"nextlat-data {arguments[0]} failed; its reason is above")


def train(config: Path, overrides: Sequence[str]) -> None:
    """`nextlat train` in a process of its own, as a user would start it."""
    command = [sys.executable, "-m", "nextlat_dist.cli", "train", "--config", str(config), *overrides]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise UserError(f"nextlat train ended with status {status}; its reason is above")


def probe(scale: Scale, config: Path, settings: Sequence[str], output: Path) -> tuple[float, float]:
    """(tokens per second of training, seconds that a run takes beside it)."""
    per_step = load_config(config, list(settings)).tokens_per_step
    tokens = scale.probe_steps * per_step
    started = time.monotonic()
    train(config, [*settings, f"training.train_tokens={tokens}", "training.log_interval=1", f"output_dir={output}"])
    wall = time.monotonic() - started
    lines = [line for line in logged(output) if "loss" in line]
    rates = [line["tokens_per_second"] for line in lines[scale.probe_steps // 2 :]]
    shutil.rmtree(output)
    speed = len(rates) / sum(1 / rate for rate in rates)  # of all those steps together
    return speed, max(0.0, wall - tokens / speed)


def tokens_that_fit(scale: Scale, config: Path, settings: Sequence[str], speed: float, seconds: float) -> int:
    """Whole steps in `seconds`, of which some are reserved for what follows."""
    per_step = load_config(config, list(settings)).tokens_per_step
    steps = int(SAFETY * (seconds - scale.reserved_seconds) * speed / per_step)
    return max(steps, scale.least_steps) * per_step


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path) -> dict[str, int | float]:
    """Parameters without the predictor, and what training took and reached."""
    from nextlat_dist.plan.counting import parameter_counts

    lines = logged(run)
    steps = [line for line in lines if "loss" in line]
    (validation,) = (line for line in lines if "validation_loss" in line)
    tokens, seconds = steps[-1]["tokens"], steps[-1]["time"] - steps[0]["time"]
    return {
        "parameters": parameter_counts(load_config(run / "config.yaml"))["base"],
        "train_tokens": tokens,
        "train_seconds": seconds,
        "train_tokens_per_second": (tokens - steps[0]["tokens"]) / seconds,
        "validation_next_token": validation["validation_next_token"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="from the start of the command to its end")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_decoding"), help="replaced if it exists")
    parser.add_argument("--json", type=Path, help="default: gpu_decoding.json in --output")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--scale", choices=sorted(SCALES), default="gpu")
    parser.add_argument("--draft-vocabulary", type=int, default=0, metavar="N", help="0: draft from all ids")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
    options = parser.parse_args(arguments)
    try:
        content = bench_gpu_decoding(
            SCALES[options.scale],
            options.config,
            options.overrides,
            options.output,
            options.minutes,
            options.draft_vocabulary,
        )
        report.write_json(options.json or options.output / "gpu_decoding.json", content)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
