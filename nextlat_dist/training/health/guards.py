"""Steps that must not be applied: all ranks look at loss and gradient norm before the optimizer does, and skip them.

A skipped step leaves weights, moments and Adam's step count as they were, bit for bit (`engine.protocol`).

Invariant: one all-reduce of a few numbers per step carries the loss terms, the norm and the requests to stop; every
rank judges from its result alone, so all come to the same verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nextlat_dist.config.schema import GuardsConfig, ObjectiveConfig
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.terms import has_targets, term_weights, weighted_sum
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.health.signals import StopRequest

NO_TARGETS = "no token of this batch is a training target"
SPREAD_FLOOR = 1e-3  # of the median: a loss that hardly moves must not make a spike of its rounding


@dataclass(frozen=True)
class Verdict:
    """What all ranks found about one step.

    Attributes:
        reason: why it was skipped; empty when it was applied.
        loss: of the global batch; None: there is no target in it, so no pass was made.
        gradient_norm: global, before clipping; None: there is none.
        sums: term sums of the global batch, float64 [terms].
        stop: a rank was asked to stop.
    """

    reason: str
    loss: float | None
    gradient_norm: float | None
    sums: torch.Tensor
    stop: bool

    @property
    def bad(self) -> bool:
        """Skipped for what the model made of its batch: the batch has targets."""
        return bool(self.reason) and self.loss is not None


class StepGuard:
    """Takes the steps of `engine`, the bad ones left out.

    Args:
        recent: (loss, gradient norm) of the last applied steps; a list in the checkpoint that this object keeps.
        stop: looked at when ranks exchange.
    """

    def __init__(
        self,
        settings: GuardsConfig,
        objective: ObjectiveConfig,
        dims: ParallelDims,
        engine: Engine,
        recent: list[list[float]],
        stop: StopRequest,
    ) -> None:
        self._settings, self._objective, self._dims, self._engine = settings, objective, dims, engine
        self._recent, self._stop = recent, stop
        self._counts = torch.zeros(0)
        self._verdict: Verdict | None = None

    def step(self, micro_batches: Sequence[Batch], counts: torch.Tensor) -> Verdict:
        """One step over this rank's rows, applied or not. Collective.

        Args:
            micro_batches: as many as accumulation steps.
            counts: positions per loss term over the global batch [terms].
        """
        if not has_targets(counts):
            return self._without_targets(counts)
        self._counts, self._verdict = counts, None
        self._engine.train_step(micro_batches, term_weights(counts, self._objective), self._may_be_applied)
        assert self._verdict is not None
        verdict: Verdict = self._verdict
        if not verdict.reason and self._settings.spike_zscore > 0:
            assert verdict.loss is not None
            assert verdict.gradient_norm is not None
            self._recent.append([verdict.loss, verdict.gradient_norm])
            del self._recent[: -self._settings.window_steps]
        return verdict

    def _without_targets(self, counts: torch.Tensor) -> Verdict:
        """The engine is not called: with gradients of zero weights would decay and moments fade. The counts are those
        of the global batch, so all ranks come here together.
        """
        sums = torch.zeros_like(counts)
        return Verdict(NO_TARGETS, None, None, sums, self._exchange(sums, 0.0)[2])

    def _may_be_applied(self, sums: torch.Tensor, norm: float) -> bool:
        self._verdict = self._judge(sums, norm)
        return not self._verdict.reason

    def _judge(self, sums: torch.Tensor, norm: float) -> Verdict:
        sums, norm, stop = self._exchange(sums, norm)
        loss = float(weighted_sum(sums, term_weights(self._counts, self._objective)))
        return Verdict(self._reason(loss, norm), loss, norm, sums, stop)

    def _exchange(self, sums: torch.Tensor, norm: float) -> tuple[torch.Tensor, float, bool]:
        """Term sums over all ranks, the norm that they agree on, whether a rank was asked to stop. Collective."""
        mine = torch.cat([sums / self._dims.tensor_size, sums.new_tensor([norm, self._stop.requested])])
        group = dist.group.WORLD
        assert group is not None
        total = all_reduce_sum(mine, group)
        return total[:-2], float(total[-2]) / self._dims.world_size, bool(total[-1] > 0)

    def _reason(self, loss: float, norm: float) -> str:
        limit = self._settings.spike_zscore
        for number, (name, value) in enumerate((("loss", loss), ("gradient norm", norm))):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if limit > 0 and len(self._recent) == self._settings.window_steps:
                score = robust_zscore(value, [step[number] for step in self._recent])
                if score > limit:
                    return f"{name} {value:.4g} has a z-score of {score:.1f}, above guards.spike_zscore={limit:g}"
        return ""


def robust_zscore(value: float, history: Sequence[float]) -> float:
    """How many deviations `value` lies above the median of `history`; a deviation is 1.4826 median absolute ones."""
    median = statistics.median(history)
    spread = 1.4826 * statistics.median(abs(one - median) for one in history)
    return (value - median) / max(spread, SPREAD_FLOOR * abs(median), 1e-12)
