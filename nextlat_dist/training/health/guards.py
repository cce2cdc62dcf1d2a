"""Steps that must not be applied: all ranks look at loss and gradient norm before the optimizer does, and skip them.

A skipped step leaves weights, moments and Adam's step count as they were, bit for bit (`engine.protocol`).

Invariant: one all-reduce of a few numbers per step carries the loss terms, the norm and the requests to stop, and is
read in one piece; every rank judges from its result alone, so all come to the same verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nextlat_dist.config.schema import GuardsConfig, ObjectiveConfig
from nextlat_dist.model.rows import Batch
from nextlat_dist.objective.terms import has_targets, term_weights, weighted_sum
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.training.engine.gradient_norm import norm_of
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
        sums: term sums of the global batch, float64 [terms], on the host.
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

    def step(
        self, micro_batches: Sequence[Batch], counts: torch.Tensor, meanwhile: Callable[[], None] | None = None
    ) -> Verdict:
        """One step over this rank's rows, applied or not. Collective.

        Args:
            micro_batches: as many as accumulation steps.
            counts: positions per loss term over the global batch [terms], on the host.
            meanwhile: see `Engine.train_step`; not called where there is no target.
        """
        if not has_targets(counts):
            return self._without_targets(counts)
        self._counts, self._verdict = counts, None
        weights = term_weights(counts, self._objective)
        self._engine.train_step(micro_batches, weights, self._may_be_applied, meanwhile)
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
        nothing = torch.zeros(len(counts) + 1, dtype=torch.float64, device=self._engine.device)
        sums, _, stop = self._exchange(nothing[:-1], nothing[-1])
        return Verdict(NO_TARGETS, None, None, sums, stop)

    def _may_be_applied(self, sums: torch.Tensor, share: torch.Tensor) -> tuple[bool, float]:
        sums, norm, stop = self._exchange(sums, share)
        loss = float(weighted_sum(sums, term_weights(self._counts, self._objective)))
        self._verdict = Verdict(self._reason(loss, norm), loss, norm, sums, stop)
        return not self._verdict.reason, norm

    def _exchange(self, sums: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, float, bool]:
        """Term sums over all ranks, on the host; the gradient norm, from every rank's share of its square; whether a
        rank was asked to stop. Collective, and the one place where a step waits for the device.
        """
        stop = torch.full((), float(self._stop.requested), dtype=sums.dtype, device=sums.device)
        mine = torch.cat([sums / self._dims.tensor_size, torch.stack([share.to(sums.dtype), stop])])
        group = dist.group.WORLD
        assert group is not None
        *total, squares, stops = all_reduce_sum(mine, group).tolist()
        return torch.tensor(total, dtype=torch.float64), norm_of(squares), stops > 0

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
