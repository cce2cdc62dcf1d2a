"""Where a cycle's time goes: one draft step and one verification, in units of one plain decoding step.

With c the draft step and v(n) the forward over n tokens, a cycle that drafts k tokens costs k·c + v(k + 1) plain steps
and writes 1 + accepted tokens: the speedup that acceptance allows. All kinds of step take turns; the median counts.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from nextlat_dist.inference.decoder import Decoder

WARM_UP_ROUNDS = 3
MEASURED_ROUNDS = 25


@dataclass(frozen=True)
class Costs:
    """`draft` and `verify[n]` (n tokens in one forward) are relative to one plain step."""

    plain_step_seconds: float
    draft: float
    verify: dict[int, float]

    def to_json(self) -> dict[str, Any]:
        verify = {str(n): cost for n, cost in self.verify.items()}
        return {"plain_step_seconds": self.plain_step_seconds, "draft": self.draft, "verify": verify}

    def summary(self) -> dict[str, float]:
        verify = {f"verify_cost_{n}": cost for n, cost in self.verify.items()}
        return {"plain_step_seconds": self.plain_step_seconds, "draft_cost": self.draft, **verify}

    def sentence(self) -> str:
        verify = ", ".join(f"v({n}) = {cost:.2f}" for n, cost in self.verify.items())
        return f"plain step {self.plain_step_seconds * 1e3:.2f} ms; draft step c = {self.draft:.2f}; forward {verify}"


@torch.inference_mode()
def measure_costs(decoder: Decoder, prompt_ids: list[int], draft_lengths: list[int]) -> Costs:
    """Greedy steps behind `prompt_ids`: plain, draft, and verification of each of `draft_lengths` drafts."""
    llama, predictor = decoder.llama, decoder.predictor
    assert predictor is not None
    device, length = llama.embedding.device, len(prompt_ids)
    cache = llama.new_cache(1, length + max(draft_lengths) + 1)
    h = llama.prefill(torch.tensor([prompt_ids], device=device), cache)
    token = int(llama.logits(h).argmax())
    blocks = {n: torch.full((1, n), token, device=device) for n in sorted({1, *(k + 1 for k in draft_lengths)})}
    seconds: dict[int, list[float]] = {n: [] for n in (0, *blocks)}  # 0: the draft step
    for _ in range(WARM_UP_ROUNDS + MEASURED_ROUNDS):
        for n, times in seconds.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            states = predictor.step(h, token) if n == 0 else llama.forward(blocks[n], cache)[0]
            llama.logits(states).argmax(dim=-1).tolist()  # waits for the device
            times.append(time.perf_counter() - started)
            cache.lengths = [length]
    median = {n: statistics.median(times[WARM_UP_ROUNDS:]) for n, times in seconds.items()}
    return Costs(median[1], median[0] / median[1], {n: median[n] / median[1] for n in blocks})
