"""Peak memory of the losses at the shape of `fineweb_edu_1p3b`, counted on meta tensors; prints JSON.

    python -m nextlat_dist.bench.loss_memory ROWS LENGTH HORIZON [KEY=VALUE ...]     (horizon 0: next-token prediction)

What counts is alive between the objective's inputs (last hidden state, embedded tokens) and the gradients of them, in
bf16, without parameters and their gradients. `nextlat_dist.bench.objective` calls it, each in a process of its own: a
process has one group of ranks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from nextlat_dist.bench.meta_tensors import Storages, fake_ranks, meta_config, on_meta
from nextlat_dist.reporting.console import say


def measured(rows: int, length: int, horizon: int, *overrides: str) -> dict[str, int]:
    """`measure` in a process of its own."""
    numbers = [str(number) for number in (rows, length, horizon)]
    command = [sys.executable, "-m", "nextlat_dist.bench.loss_memory", *numbers, *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measure(rows: int, length: int, horizon: int, overrides: list[str]) -> dict[str, Any]:
    """Bytes alive at most between the objective's inputs and their gradients, without parameters and their gradients;
    the most rows of a tensor whose last dimension is a vocabulary.
    """
    fake_ranks(1)
    name = "nextlat" if horizon else "next_token"
    settings = [f"objective.name={name}", f"objective.horizon={max(horizon, 1)}", f"data.sequence_length={length}"]
    config, dims = meta_config("fineweb_edu_1p3b", settings + overrides)
    from nextlat_dist.model.layer_list import layer_list
    from nextlat_dist.model.rows import Batch, ObjectiveInputs
    from nextlat_dist.objective.fused_objective import set_term_weights
    from nextlat_dist.objective.terms import term_counts, term_weights, weighted_sum

    entry = layer_list(config, dims, torch.float32)[-1]
    objective = on_meta(lambda: entry.cls(**entry.arguments), torch.bfloat16)
    batch = Batch.of(*[torch.zeros(rows, length + 1, dtype=torch.int32, device="meta") for _ in range(4)])
    shape, kind = (length, rows, config.model.hidden_size), {"dtype": torch.bfloat16, "device": "meta"}
    hidden, embedded = (torch.zeros(shape, **kind).requires_grad_() for _ in range(2))  # type: ignore[call-overload]
    weights = term_weights(term_counts(batch, config.objective), config.objective).float()
    set_term_weights(objective, weights)
    parameters = list(objective.parameters())
    shapes = [tuple(parameter.shape) for parameter in parameters]
    with Storages(parameters, [*shapes, *(size[::-1] for size in shapes)]) as storages:
        inputs = ObjectiveInputs(hidden.view_as(hidden), batch.message, embedded.view_as(embedded) if horizon else None)
        for tensor in (inputs.hidden, inputs.embedded):
            if tensor is not None:
                storages.note(tensor)
        terms = objective(inputs)
        loss = terms.loss if hasattr(terms, "loss") else weighted_sum(terms, weights)
        del inputs, terms
        loss.backward()
    vocabulary = (config.model.vocab_size, config.model.padded_vocab_size)
    head = config.model.hidden_size  # the weight, transposed, is no tensor of logits
    logits = [size for size in storages.seen if size and size[-1] in vocabulary and size[:-1] != (head,)]
    return {"peak_bytes": storages.peak, "rows_of_logits": max(torch.Size(size[:-1]).numel() for size in logits)}


if __name__ == "__main__":
    rows, length, horizon = map(int, sys.argv[1:4])
    say(json.dumps(measure(rows, length, horizon, sys.argv[4:])))
