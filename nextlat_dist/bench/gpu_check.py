"""A check of what only a GPU can show, in at most nine minutes: GPU tests, step times, memory of losses, decoding.

    bash launch/gpu_check.sh [--json FILE] [--pictures DIR] [--minutes 9] [--scale gpu|tiny]

It runs with the Python that it is given, without set-up and without network. A section whose packages are missing, or
that does not end in time, says so by name; the JSON is complete after every section. `--scale tiny` runs all of it
small, on a CPU too: it shows that it runs.

`tests_passed`, `tests_failed`                 of the tests that need a GPU
`varlen_over_dense`                            attention over documents, varlen flash over a dense mask: time
`loss_peak_gb_8192_d0`, `loss_peak_gb_…_whole` memory of next-token losses, fused and with whole logits
`step_ratio_…`, `gpt_over_transformers`        as in `nextlat_dist.bench.step_time`
`draft_cost_b1|b8`, `verify_cost_b1|b8_N`      of decoding with CUDA graphs, in plain steps
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.options import add_outputs
from nextlat_dist.reporting.publish import publish
from nextlat_dist.reporting.report import Report, write_json
from nextlat_dist.reporting.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "bash launch/gpu_check.sh"
COLUMNS = {"section": "{section}", "seconds": "{seconds:.0f}", "outcome": "{outcome}"}
CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class CheckScale:
    """Shapes: of the losses and attention (rows of `length` tokens), and of the model that is decoded."""

    hidden_size: int = 2048
    vocab_size: int = 50304
    rows: int = 8
    length: int = 1024
    document_tokens: int = 128
    heads: int = 16
    layers: int = 22
    predictor_hidden_size: int = 2048
    widths: tuple[int, ...] = (2, 3, 5, 9)
    prompt_tokens: int = 512


SCALES = {
    "gpu": CheckScale(),
    "tiny": CheckScale(64, 512, 2, 64, 16, 4, 2, 64, (2, 3), 24),
}


def gpu_tests(scale: CheckScale) -> dict[str, float]:
    """The tests that are skipped without a GPU, with this Python."""
    files = ["tests/inference/engine/test_graphs.py", "tests/model/test_attention.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "graph or flash", *files]
    ended = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", ended.stdout)}
    if not counts:
        raise RuntimeError(ended.stdout[-500:] + ended.stderr[-500:])
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return {"tests_passed": counts.get("passed", 0), "tests_failed": failed, "tests_skipped": counts.get("skipped", 0)}


def attention(scale: CheckScale) -> dict[str, float]:
    """Core attention, forward and backward, over rows of documents: as here, and with a dense mask."""
    import torch

    from nextlat_dist.model.attention import DocumentAttention, document_attention_mask, visible
    from nextlat_dist.model.rows import Batch

    where = _device()
    ids = (torch.arange(scale.length + 1) // scale.document_tokens).expand(scale.rows, -1)
    message = Batch.of(ids, ids, torch.ones_like(ids)).message.to(where)
    documents = scale.rows * -(-scale.length // scale.document_tokens)
    shape = (scale.length, scale.rows, scale.heads, scale.hidden_size // scale.heads)
    inputs = [torch.randn(shape, device=where, dtype=_dtype(where)).requires_grad_() for _ in range(3)]
    core = DocumentAttention(_NoScale)
    mask = document_attention_mask(Batch(message).input_documents)

    def run(seen: Any) -> Callable[[], object]:
        return lambda: core(*inputs, seen).sum().backward()

    seconds = _seconds({"documents": run(visible(message, documents)), "dense": run(mask)}, where)
    return {"varlen_over_dense": seconds["documents"] / seconds["dense"], "attention_ms": 1e3 * seconds["documents"]}


class _NoScale:
    softmax_scale = None


def losses(scale: CheckScale) -> dict[str, float]:
    """Next-token losses and their gradients: the most memory that they take, and time, fused and with whole logits."""
    import torch
    import torch.distributed as dist

    from nextlat_dist.objective.losses.chunks import cross_entropies
    from nextlat_dist.objective.losses.fused import VocabularyPass
    from nextlat_dist.objective.losses.vocab_parallel import vocab_parallel_cross_entropy, vocab_parallel_logits
    from nextlat_dist.parallel.dims import initialize_distributed

    initialize_distributed()
    where, group = _device(), dist.group.WORLD
    assert group is not None
    rows = scale.rows * scale.length
    hidden = torch.randn(rows, scale.hidden_size, device=where, dtype=_dtype(where)).requires_grad_()
    weight = (0.02 * torch.randn(scale.vocab_size, scale.hidden_size, device=where)).to(hidden.dtype).requires_grad_()
    targets = torch.randint(0, scale.vocab_size, (rows,), device=where)
    mask, factor = torch.ones(rows, dtype=torch.bool, device=where), torch.full((1,), 1 / rows, device=where)

    def make_pass(count: int, **wanted: Any) -> VocabularyPass:
        return VocabularyPass(weight, scale.vocab_size, group, count, **wanted)

    def fused() -> None:
        terms = cross_entropies(make_pass, weight, hidden, targets, [mask], factor)
        terms.loss.backward()  # type: ignore[union-attr]

    def whole() -> None:
        logits = vocab_parallel_logits(hidden[:, None], weight, scale.vocab_size, group)
        vocab_parallel_cross_entropy(logits, targets[:, None], group)[0].mean().backward()

    ways = {"": fused, "_whole": whole}
    seconds = _seconds({"fused": fused, "whole": whole}, where)
    found = {"unfused_over_fused_d0": seconds["whole"] / seconds["fused"]}
    if where.type == "cuda":
        for name, way in ways.items():
            hidden.grad = weight.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            way()
            torch.cuda.synchronize()
            found[f"loss_peak_gb_{rows}_d0{name}"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    dist.destroy_process_group()
    return found


def steps(scale: CheckScale) -> dict[str, float]:
    """`nextlat_dist.bench.step_time`: of the 1.3B shape on a GPU."""
    with tempfile.TemporaryDirectory(prefix="nextlat-gpu-check-") as directory:
        file = Path(directory) / "steps.json"
        quick = ["--quick"] if scale == SCALES["tiny"] else []
        command = [sys.executable, "-m", "nextlat_dist.bench.step_time", "--json", str(file), *quick]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise RuntimeError(ended.stderr[-1000:])
        report = json.loads(file.read_text())
    speeds = {f"teraflops of {row['step']}": row["teraflops"] for row in report["rows"]}
    utilisation = {f"mfu of {row['step']}": row["mfu"] for row in report["rows"] if row["mfu"] is not None}
    return {**report["summary"], **speeds, **utilisation}


def decoding(scale: CheckScale) -> dict[str, float]:
    """Plain, draft and verification steps of a model with random weights; with CUDA graphs where there is CUDA."""
    import torch

    from nextlat_dist.evaluation.speculative.step_costs import measure_costs
    from nextlat_dist.huggingface.base import save_base_weights
    from nextlat_dist.huggingface.drafters.latent_predictor import (
        PREDICTOR_TENSORS,
        LatentPredictorConfig,
        save_predictor,
    )
    from nextlat_dist.inference import load

    hidden, width, dtype = scale.hidden_size, scale.predictor_hidden_size, _dtype(_device())
    ffn = 128 * max(1, round(8 * hidden / 3 / 128))
    shapes = {"model.embed_tokens.weight": (scale.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for layer in range(scale.layers):
        of_layer = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            **{f"self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"},
            "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes["lm_head.weight"] = (scale.vocab_size, hidden)
    weights = {name: 0.02 * torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": scale.vocab_size, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": scale.heads, "num_key_value_heads": scale.heads, "head_dim": hidden // scale.heads,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2 * scale.prompt_tokens,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    predictor_shapes = ((2 * hidden,), (2 * hidden,), (width, 2 * hidden), (width, width), (hidden, width))
    predictor = {
        name: 0.02 * torch.randn(shape, dtype=dtype)
        for name, shape in zip(PREDICTOR_TENSORS, predictor_shapes, strict=True)
    }
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="nextlat-gpu-check-") as directory:
        export = Path(directory)
        (export / "config.json").write_text(json.dumps(config))
        sha256 = save_base_weights(export, weights)
        save_predictor(export, LatentPredictorConfig(hidden, width, scale.vocab_size, 8, 1e-5, sha256), predictor)
        decoder = load(export, str(_device()), dtype)
        prompt = [token % scale.vocab_size for token in range(scale.prompt_tokens)]
        for batch_size in (1, 8):
            costs = measure_costs(decoder, prompt, batch_size, scale.widths)
            found[f"plain_step_ms_b{batch_size}"] = 1e3 * costs.plain_seconds
            found[f"draft_cost_b{batch_size}"] = costs.draft or 0.0
            found |= {f"verify_cost_b{batch_size}_{n}": cost for n, cost in costs.verify.items() if n > 1}
    return found


@dataclass(frozen=True)
class Section:
    """A part of the check, run in a process of its own.

    Attributes:
        needs: packages without which it cannot run.
        share: of the minutes, at most.
    """

    run: Callable[[CheckScale], dict[str, float]]
    needs: tuple[str, ...]
    share: float


SECTIONS = {
    "attention": Section(attention, ("torch",), 0.1),
    "losses": Section(losses, ("torch",), 0.1),
    "decoding": Section(decoding, ("torch", "safetensors"), 0.25),
    "steps": Section(steps, ("torch", "deepspeed", "megatron.core", "transformers"), 0.5),
    "tests": Section(gpu_tests, ("torch", "pytest"), 0.25),
}


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype(where: Any) -> Any:
    import torch

    return torch.bfloat16 if where.type == "cuda" else torch.float32


def _seconds(ways: dict[str, Callable[[], object]], where: Any, rounds: int = 10) -> dict[str, float]:
    """Median seconds of each, in alternation, after two rounds that do not count."""
    import statistics

    import torch

    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            if where.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            way()
            if where.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in times.items()}


def is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def check(scale_name: str, seconds: float, written: Callable[[Report], None]) -> Report:
    """All sections, one after the other; `written` gets the report so far after each."""
    ends_at = time.monotonic() + seconds
    summary: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    report = Report(COMMAND, {"scale": scale_name, **asdict(SCALES[scale_name])}, summary, rows)
    for name, section in SECTIONS.items():
        say(f"{name} …")
        started = time.monotonic()
        missing = [package for package in section.needs if not is_there(package)]
        outcome = f"not run: {', '.join(missing)} not installed"
        if not missing:
            outcome = "done"
            limit = max(1.0, min(section.share * seconds, ends_at - started))
            command = [sys.executable, "-m", "nextlat_dist.bench.gpu_check", "--section", name, "--scale", scale_name]
            try:
                ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
                if ended.returncode:
                    outcome = f"failed: {(ended.stderr.strip() or 'no message').splitlines()[-1]}"
                else:
                    summary |= json.loads(ended.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                outcome = f"stopped: not done in {limit:.0f} s"
        rows.append({"section": name, "seconds": time.monotonic() - started, "outcome": outcome})
        lines = [f"{key} = {value:,.4g}" for key, value in summary.items()]
        report = Report(
            COMMAND, report.options, dict(summary), list(rows), text="\n".join([table(COLUMNS, rows), *lines]),
            pictures={"gpu_check.png": partial(_picture, dict(summary))},
        )  # fmt: skip
        written(report)
    return report


def _picture(summary: dict[str, float]) -> Figure:
    """Step times over GPT's, and what verifying n tokens costs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    horizons = [d for d in (1, 2, 8) if f"step_ratio_d{d}" in summary]
    places = range(len(horizons))
    left.bar([p - 0.2 for p in places], [summary[f"step_ratio_d{d}"] for d in horizons], 0.4, label="measured")
    left.bar([p + 0.2 for p in places], [summary[f"flop_ratio_d{d}"] for d in horizons], 0.4, label="by FLOPs")
    left.set_xticks(list(places), [f"d = {d}" for d in horizons])
    left.set_ylabel("time of a step, GPT = 1")
    left.set_title("NextLat's training step")
    if horizons:
        left.legend()
    for batch_size in (1, 8):
        prefix = f"verify_cost_b{batch_size}_"
        costs = {1: 1.0} | {int(key.removeprefix(prefix)): v for key, v in summary.items() if key.startswith(prefix)}
        if len(costs) > 1:
            right.plot(list(costs), list(costs.values()), marker="o", label=f"batch {batch_size}")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("tokens verified at once")
    right.set_ylabel("time, plain step = 1")
    right.set_title("Verification")
    if right.lines:
        right.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description="What only a GPU can show, in a few minutes.")
    add_outputs(parser, pictures="a PNG")
    parser.add_argument("--minutes", type=float, default=9.0, metavar="N", help="at most (default: 9)")
    parser.add_argument("--scale", choices=SCALES, default="gpu", help="tiny: shows that it runs (default: gpu)")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        say(json.dumps(SECTIONS[options.section].run(SCALES[options.scale])))
        return 0
    if options.scale == "gpu" and (not is_there("torch") or _device().type != "cuda"):
        say("error: there is no GPU that torch can use; --scale tiny runs the check small on a CPU", error=True)
        return 2

    def write(so_far: Report) -> None:
        if options.json is not None:
            write_json(options.json, so_far.content())

    report = check(options.scale, 60 * options.minutes, write)
    publish(report, options.json, options.pictures)
    return 0 if all(row["outcome"] == "done" for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
