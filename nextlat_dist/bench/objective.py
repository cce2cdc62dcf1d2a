"""The cost of the losses and of document attention: time of the losses alone, their memory, attention over documents.

    python -m nextlat_dist.bench.objective [--json FILE] [--quick]

`unfused_over_fused_d0|d1|d2`        losses and their gradients, time with whole logits over fused; larger is better
`attention_over_documents_4096`      attention in rows of 4,096 tokens with documents of 500, over those documents
                                     each laid out by itself; smaller is better
`loss_peak_gb_8192_d0|d1|d2|d8`      memory of the losses at the 1.3B shape, counted on meta tensors (`loss_memory`)
`loss_peak_gb_33792_d8`              the same for 33,792 tokens

Both sides of a ratio alternate; one thread of a CPU, processor time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from nextlat_dist.bench.loss_memory import measured
from nextlat_dist.bench.timing import alternate, with_summary
from nextlat_dist.config.load import config_from_dict
from nextlat_dist.reporting.publish import run_benchmark
from nextlat_dist.reporting.report import Report

KINDS = ("fused", "whole")
COMMAND = "python -m nextlat_dist.bench.objective"
COLUMNS = {
    "measurement": "{measurement}",
    "tokens/CPU s": "{tokens_per_cpu_second:,.0f}",
    "GB": "{gigabytes:.2f}",
}


@dataclass(frozen=True)
class ObjectiveSizes:
    """Shapes: of the losses, of attention, and rows of 1,024 tokens whose memory is counted, by horizon."""

    hidden_size: int = 256
    predictor_hidden_size: int = 768
    vocab_size: int = 50304
    sequence_length: int = 512
    document_tokens: int = 500
    attention_length: int = 4096
    attention_heads: int = 4
    head_size: int = 64
    rounds: int = 5
    counted: tuple[tuple[int, int], ...] = ((8, 0), (8, 1), (8, 2), (8, 8), (33, 8))


QUICK = ObjectiveSizes(
    hidden_size=64, predictor_hidden_size=96, vocab_size=512, sequence_length=64, document_tokens=50,
    attention_length=128, rounds=2, counted=((1, 0),),
)  # fmt: skip


def losses(sizes: ObjectiveSizes, horizon: int, fused: bool) -> Callable[[], int]:
    """The losses of a row and their gradients, for the head, the predictor, the hidden states and e(x)."""
    import torch

    from nextlat_dist.model.layer_list import initialize, layer_list
    from nextlat_dist.model.rows import ObjectiveInputs
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import term_counts, term_weights, weighted_sum
    from nextlat_dist.parallel.dims import ParallelDims

    config = config_from_dict(
        {
            "model": {"num_layers": 1, "hidden_size": sizes.hidden_size, "vocab_size": sizes.vocab_size},
            "predictor": {"hidden_size": sizes.predictor_hidden_size},
            "objective": {"name": "nextlat" if horizon else "next_token", "horizon": max(horizon, 1)},
            "data": {"sequence_length": sizes.sequence_length},
            "training": {"fused_losses": fused},
        }
    )
    dims = ParallelDims.initialize(config.parallel)
    entry = layer_list(config, dims, torch.float32)[-1]
    objective = entry.cls(**entry.arguments)
    initialize(objective, config, dims)
    batch = documents_of(sizes.sequence_length, sizes.document_tokens, sizes.vocab_size)
    weights = term_weights(term_counts(batch, config.objective), config.objective).float()
    set_term_weights(objective, weights)
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.sequence_length, 1, sizes.hidden_size)
    hidden, embedded = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))

    def run() -> int:
        terms = objective(ObjectiveInputs(hidden, batch.message, embedded if horizon else None))
        loss = terms.loss if fused else weighted_sum(terms, weights)
        loss.backward()
        for tensor in (hidden, embedded, *objective.parameters()):
            tensor.grad = None
        return sizes.sequence_length

    return run


def documents_of(length: int, document_tokens: int, vocab_size: int) -> Any:
    """A batch of one row of random tokens."""
    import torch

    from nextlat_dist.model.rows import Batch

    tokens = torch.randint(0, vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(length + 1) // document_tokens)[None]
    return Batch.of(tokens, documents, torch.ones_like(tokens))


def attention(sizes: ObjectiveSizes, *, as_rows: bool) -> Callable[[], int]:
    """Attention and its gradients: of a row of documents, or of the same documents laid out one by one."""
    import torch
    import torch.nn.functional as F

    from nextlat_dist.model.attention import DocumentAttention, visible

    length, heads, size = sizes.attention_length, sizes.attention_heads, sizes.head_size
    message = documents_of(length, sizes.document_tokens, 100).message
    generator = torch.Generator().manual_seed(0)
    shape = (3, length, 1, heads, size)
    query, key, value = (part.clone().requires_grad_() for part in torch.randn(shape, generator=generator))
    core = DocumentAttention(_AttentionConfig)
    full, rest = divmod(length, sizes.document_tokens)
    laid_out = []
    for start, documents, tokens in ((0, full, sizes.document_tokens), (length - rest, 1, rest)):
        if documents and tokens:
            parts = (t.detach()[start : start + documents * tokens] for t in (query, key, value))
            shaped = (t.reshape(documents, tokens, heads, size).transpose(1, 2).contiguous() for t in parts)
            laid_out.append([t.requires_grad_() for t in shaped])

    def rows() -> int:
        core(query, key, value, visible(message)).sum().backward()
        return length

    def alone() -> int:
        for q, k, v in laid_out:
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        return length

    return rows if as_rows else alone


class _AttentionConfig:
    softmax_scale = None


def bench_objective(sizes: ObjectiveSizes) -> Report:
    from nextlat_dist.parallel.device import quiet_third_parties, use_cpu_where_no_cuda

    use_cpu_where_no_cuda()
    quiet_third_parties()
    import torch

    from nextlat_dist.parallel.dims import initialize_distributed, shutdown

    torch.set_num_threads(1)
    initialize_distributed()
    horizons = (0, 1, 2)
    with tqdm(total=8 * (sizes.rounds + 1) + len(sizes.counted), desc="bench objective", file=sys.stderr) as bar:

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        try:
            pairs = {
                **{f"losses, d = {d}, {kind}": losses(sizes, d, kind == "fused") for d in horizons for kind in KINDS},
                "attention in rows": attention(sizes, as_rows=True),
                "attention, documents alone": attention(sizes, as_rows=False),
            }
            rates = alternate(pairs, sizes.rounds, done)
        finally:
            shutdown()
        peaks = {}
        for rows, horizon in sizes.counted:
            peaks[f"loss_peak_gb_{rows * 1024}_d{horizon}"] = measured(rows, 1024, horizon)["peak_bytes"] / 1e9
            done(f"memory of {rows * 1024:,} tokens")
    summary = {
        f"unfused_over_fused_d{d}": rates[f"losses, d = {d}, whole"].cpu_time_over(rates[f"losses, d = {d}, fused"])
        for d in horizons
    }
    ratio = rates["attention in rows"].cpu_time_over(rates["attention, documents alone"])
    summary[f"attention_over_documents_{sizes.attention_length}"] = ratio
    summary |= peaks
    table = [
        {"measurement": name, "tokens_per_cpu_second": found.cpu_median, "gigabytes": None}
        for name, found in rates.items()
    ]
    table += [{"measurement": name, "tokens_per_cpu_second": None, "gigabytes": gb} for name, gb in peaks.items()]
    return Report(COMMAND, asdict(sizes), summary, table, text=with_summary(COLUMNS, table, summary))


def main(arguments: list[str] | None = None) -> int:
    return run_benchmark(COMMAND, "What losses and attention cost.", _measure, arguments)


def _measure(options: argparse.Namespace) -> Report:
    return bench_objective(QUICK if options.quick else ObjectiveSizes())


if __name__ == "__main__":
    sys.exit(main())
