"""Time of a training step: GPT, NextLat, MTP, JTP and BST, and what people would use instead.

    python -m nextlat_dist.bench.step_time [--json FILE] [--quick]

`step_ratio_d1|d2|d8`        time of a NextLat step at that horizon over a GPT step; smaller is better
`flop_ratio_d1|d2|d8`        what the FLOPs of the two say it should be
`step_ratio_mtp2|jtp2`       multi-token prediction, and joint, with two more tokens over GPT
`step_ratio_bst`             the Belief State Transformer with a hundredth of all pairs over GPT
`step_ratio_d2_detached`     NextLat whose base is trained as by GPT, d = 2, over GPT
`unfused_over_fused_gpt`     a GPT step with whole logits through autograd over one with fused losses; larger is better
`gpt_over_transformers`      our GPT step over `transformers.LlamaForCausalLM` with torch's AdamW, at vocabulary 8,192

A step is what training does with a global batch: forward, backward, guards, clipping, ZeRO-1, AdamW. All sides have the
same rows and alternate, in two groups that both have GPT: no device holds all at once. On a CPU it is one thread, and
processor time; on a GPU the shape of `fineweb_edu_1p3b`, and time.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from nextlat_dist.bench.timing import Rates, alternate, with_summary
from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.plan.counting import flops_per_token, parameter_counts
from nextlat_dist.reporting.publish import run_benchmark
from nextlat_dist.reporting.report import Report

COMMAND = "python -m nextlat_dist.bench.step_time"
COLUMNS = {
    "step": "{step}",
    "parameters": "{parameters:,}",
    "vocabulary": "{vocabulary:,}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "tokens/CPU s": "{tokens_per_cpu_second:,.0f}",
    "TFLOP/s": "{teraflops:.3f}",
    "MFU": "{mfu:.1%}",
    "peak GB": "{peak_gigabytes:.2f}",
}
SMALL_VOCABULARY = 8192  # where the output head does not hide the rest


@dataclass(frozen=True)
class StepSizes:
    """The shape of the model and of a step.

    Attributes:
        document_tokens: of each document in a row of `sequence_length`.
        rows: in a step and micro-batch.
    """

    num_layers: int = 8
    hidden_size: int = 256
    num_attention_heads: int = 4
    predictor_hidden_size: int = 768
    vocab_size: int = 50304
    small_vocab_size: int = SMALL_VOCABULARY
    sequence_length: int = 512
    document_tokens: int = 500
    rows: int = 2
    precision: str = "fp32"
    rounds: int = 5


QUICK = StepSizes(
    num_layers=2, hidden_size=64, predictor_hidden_size=96, vocab_size=512, small_vocab_size=256, sequence_length=64,
    document_tokens=50, rounds=2,
)  # fmt: skip
OF_1P3B = StepSizes(
    num_layers=22, hidden_size=2048, num_attention_heads=16, predictor_hidden_size=2048, small_vocab_size=50304,
    sequence_length=1024, document_tokens=1000, rows=8, precision="bf16",
)  # fmt: skip

OBJECTIVES: dict[str, dict[str, Any]] = {
    "GPT": {"name": "next_token"},
    **{f"NextLat, d = {d}": {"name": "nextlat", "horizon": d} for d in (1, 2, 8)},
    "MTP, d = 2": {"name": "mtp", "horizon": 2},
}
OTHERS: dict[str, dict[str, Any]] = {
    "GPT": OBJECTIVES["GPT"],
    "JTP, d = 2": {"name": "jtp", "horizon": 2},
    "BST, 1 % of pairs": {"name": "bst", "pair_rate": 0.01},
    "NextLat, d = 2, detached": {"name": "nextlat", "horizon": 2, "detach_base": True},
}
UNFUSED, SMALL, REFERENCE = "GPT, losses not fused", "GPT, small vocabulary", "transformers, small vocabulary"


def config_of(sizes: StepSizes, objective: dict[str, Any], vocab_size: int, *, fused: bool = True) -> RunConfig:
    return config_from_dict(
        {
            "model": {
                "num_layers": sizes.num_layers,
                "hidden_size": sizes.hidden_size,
                "num_attention_heads": sizes.num_attention_heads,
                "vocab_size": vocab_size,
            },
            "predictor": {"hidden_size": sizes.predictor_hidden_size},
            "objective": objective,
            "data": {"sequence_length": sizes.sequence_length},
            "parallel": {"zero_stage": 1},
            "training": {
                "micro_batch_size": sizes.rows,
                "global_batch_size": sizes.rows,
                "precision": sizes.precision,
                "fused_losses": fused,
            },
        }
    )


class OurStep:
    """A whole step of training on rows of random tokens; call it for one."""

    def __init__(self, config: RunConfig, document_tokens: int) -> None:
        import torch

        from nextlat_dist.model.rows import Batch
        from nextlat_dist.objective.terms import term_counts
        from nextlat_dist.parallel.dims import ParallelDims
        from nextlat_dist.training.engine.build import build_engine
        from nextlat_dist.training.health.guards import StepGuard
        from nextlat_dist.training.health.signals import StopRequest

        dims = ParallelDims.initialize(config.parallel)
        self.config, self._engine = config, build_engine(config, dims)
        self._guard = StepGuard(config.guards, config.objective, dims, self._engine, [], StopRequest())
        tokens = random_rows(config)
        documents = (torch.arange(tokens.shape[1]) // document_tokens).expand_as(tokens)
        self._batch = Batch.of(tokens, documents, torch.ones_like(tokens))
        self._batch = Batch(self._batch.message.to(self._engine.device))
        self._counts = term_counts(self._batch, config.objective).cpu()
        self.tokens = config.tokens_per_step
        self.attended = float(self._batch.attended) / self.tokens

    def __call__(self) -> int:
        verdict = self._guard.step([self._batch], self._counts)
        assert not verdict.reason, verdict.reason
        return self.tokens

    def close(self) -> None:
        self._engine.close()

    def flops(self) -> float:
        return self.tokens * flops_per_token(self.config, self.attended)


class TransformersStep:
    """A step as a user of transformers writes it: loss, backward, clipping, fused AdamW where torch has one."""

    def __init__(self, config: RunConfig) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from nextlat_dist.parallel.device import device

        model = config.model
        torch.manual_seed(0)
        self._model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.ffn_size,
                num_hidden_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                max_position_embeddings=config.max_position_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        ).to(device())
        if config.training.precision == "bf16":
            self._model.bfloat16()
        settings = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
        )
        self._clip, self._rows = settings.clip_grad, random_rows(config)[:, :-1].to(device())

    def __call__(self) -> int:
        import torch

        loss = self._model(input_ids=self._rows, labels=self._rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss.item()
        return self._rows.numel()


def random_rows(config: RunConfig) -> Any:
    """Tokens [rows, s + 1]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (config.training.micro_batch_size, config.data.sequence_length + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=generator)


def bench_step_time(sizes: StepSizes) -> Report:
    from nextlat_dist.parallel.device import (
        device,
        has_cuda,
        peak_tflops,
        quiet_third_parties,
        use_cpu_where_no_cuda,
    )

    use_cpu_where_no_cuda()
    quiet_third_parties()
    import torch

    from nextlat_dist.parallel.dims import initialize_distributed, shutdown

    if not has_cuda():
        torch.set_num_threads(1)
    device()
    initialize_distributed()
    sides = len(OBJECTIVES) + 3 + len(OTHERS)
    with tqdm(total=sides * (sizes.rounds + 2), desc="bench step_time", file=sys.stderr) as bar:

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        gpt, peaks = OBJECTIVES["GPT"], dict[str, float]()
        first = {
            **{name: config_of(sizes, objective, sizes.vocab_size) for name, objective in OBJECTIVES.items()},
            UNFUSED: config_of(sizes, gpt, sizes.vocab_size, fused=False),
            SMALL: config_of(sizes, gpt, sizes.small_vocab_size),
        }
        others = {name: config_of(sizes, objective, sizes.vocab_size) for name, objective in OTHERS.items()}
        try:
            rates, flops = _measured(first, sizes, peaks, done, {REFERENCE: first[SMALL]})
            again, of_others = _measured(others, sizes, peaks, done)
        finally:
            shutdown()
    wanted, flops = {**others, **first}, {**of_others, **flops}
    on_cpu = not has_cuda()
    summary: dict[str, float] = {}
    for d in (1, 2, 8):
        name = f"NextLat, d = {d}"
        summary[f"step_ratio_d{d}"] = time_ratio(rates[name], rates["GPT"], on_cpu)
        summary[f"flop_ratio_d{d}"] = flops[name] / flops["GPT"]
    summary["step_ratio_mtp2"] = time_ratio(rates["MTP, d = 2"], rates["GPT"], on_cpu)
    summary["flop_ratio_mtp2"] = flops["MTP, d = 2"] / flops["GPT"]
    for key, name in zip(("jtp2", "bst", "d2_detached"), list(OTHERS)[1:], strict=True):
        summary[f"step_ratio_{key}"] = time_ratio(again[name], again["GPT"], on_cpu)
        summary[f"flop_ratio_{key}"] = flops[name] / flops["GPT"]
    summary["unfused_over_fused_gpt"] = time_ratio(rates[UNFUSED], rates["GPT"], on_cpu)
    summary["gpt_over_transformers"] = time_ratio(rates[SMALL], rates[REFERENCE], on_cpu)
    rows, peak = [], peak_tflops()
    for name, found in {**again, **rates}.items():
        speed = found.cpu_median if on_cpu else found.median
        config = wanted[SMALL if name == REFERENCE else name]
        of_step = flops[SMALL if name == REFERENCE else name] / config.tokens_per_step
        rows.append(
            {
                "step": name,
                "parameters": parameter_counts(config)["total"],
                "vocabulary": config.model.vocab_size,
                "tokens_per_second": found.median,
                "tokens_per_cpu_second": found.cpu_median,
                "teraflops": speed * of_step / 1e12,
                "mfu": None if peak is None else speed * of_step / (peak[0] * 1e12),
                "peak_gigabytes": peaks.get(name),
            }
        )
    return Report(COMMAND, asdict(sizes), summary, rows, text=with_summary(COLUMNS, rows, summary))


def _measured(
    configs: Mapping[str, RunConfig],
    sizes: StepSizes,
    peaks: dict[str, float],
    done: Callable[[str], None],
    references: Mapping[str, RunConfig] | None = None,
) -> tuple[dict[str, Rates], dict[str, float]]:
    """Rates of steps that alternate, and the FLOPs of ours; their engines are gone afterwards."""
    steps: dict[str, Callable[[], int]] = {}
    ours: dict[str, OurStep] = {}
    for name, config in configs.items():
        steps[name] = ours[name] = OurStep(config, sizes.document_tokens)
        done(name)
    for name, config in (references or {}).items():
        steps[name] = TransformersStep(config)
        done(name)
    rates = alternate({name: _peak_of(name, step, peaks) for name, step in steps.items()}, sizes.rounds, done)
    flops = {name: step.flops() for name, step in ours.items()}
    for step in ours.values():
        step.close()
    del steps, ours, step
    gc.collect()
    return rates, flops


def time_ratio(one: Rates, other: Rates, on_cpu: bool) -> float:
    """Time of `one` over time of `other`."""
    return one.cpu_time_over(other) if on_cpu else 1 / one.ratio_to(other)


def _peak_of(name: str, step: Callable[[], int], peaks: dict[str, float]) -> Callable[[], int]:
    """`step`, which also notes the largest memory of a GPU while it runs, without what the other sides hold."""
    import torch

    from nextlat_dist.parallel.device import has_cuda

    if not has_cuda():
        return step

    def run() -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tokens = step()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
        return tokens

    return run


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(COMMAND, "How long a training step takes.", _measure, arguments)


def _measure(options: argparse.Namespace) -> Report:
    from nextlat_dist.parallel.compiled import compiled_pieces
    from nextlat_dist.parallel.device import device, has_cuda

    with compiled_pieces("auto", device()):
        return bench_step_time(QUICK if options.quick else OF_1P3B if has_cuda() else StepSizes())


if __name__ == "__main__":
    sys.exit(main())
