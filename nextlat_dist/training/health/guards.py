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
from nextlat_dist.objective.terms import has_targets, term_weights, terms_of_parts, weighted_sum
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.training.engine.gradient_norm import norm_of
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.health.signals import StopRequest
from nextlat_dist.training.state.trainer_state import ApartState

NO_TARGETS = "no token of this batch is a training target"
SPREAD_FLOOR = 1e-3  # of the median: a loss that hardly moves must not make a spike of its rounding


@dataclass(frozen=True)
class ApartVerdict:
    """What they found about it of what is trained apart from the base; the attributes as of `Verdict`."""

    reason: str
    loss: float
    gradient_norm: float


@dataclass(frozen=True)
class Verdict:
    """What all ranks found about one step: of the base, with all that is trained with it.

    Attributes:
        reason: why it was skipped; empty when it was applied.
        loss: of the global batch; None: there is no target in it, so no pass was made.
        gradient_norm: global, before clipping; None: there is none.
        sums: term sums of the global batch, float64 [terms], on the host.
        stop: a rank was asked to stop.
        apart: of what is trained apart; None: there is nothing, or no pass was made.
    """

    reason: str
    loss: float | None
    gradient_norm: float | None
    sums: torch.Tensor
    stop: bool
    apart: ApartVerdict | None = None

    @property
    def bad(self) -> bool:
        """Skipped for what the model made of its batch: the batch has targets."""
        return bool(self.reason) and self.loss is not None


def learnt_terms(
    verdict: Verdict, counts: torch.Tensor, objective: ObjectiveConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and counts [terms] of an applied step; where what is trained apart was refused, zeros for its terms."""
    if verdict.apart is None or not verdict.apart.reason:
        return verdict.sums, counts
    sums, counts = verdict.sums.clone(), counts.clone()
    _, refused = terms_of_parts(objective)
    sums[refused], counts[refused] = 0, 0
    return sums, counts


class StepGuard:
    """Takes the steps of `engine`, the bad ones left out.

    Args:
        recent: (loss, gradient norm) of the last applied steps; a list in the checkpoint that this object keeps.
        stop: looked at when ranks exchange.
        apart: the same of what is trained apart, with its steps; None: of a run that begins.
    """

    def __init__(
        self,
        settings: GuardsConfig,
        objective: ObjectiveConfig,
        dims: ParallelDims,
        engine: Engine,
        recent: list[list[float]],
        stop: StopRequest,
        apart: ApartState | None = None,
    ) -> None:
        self._settings, self._objective, self._dims, self._engine = settings, objective, dims, engine
        self._stop, self._apart = stop, ApartState() if apart is None else apart
        self._recent = [recent, self._apart.recent]  # of each part
        self._weights = torch.zeros(0)
        self._verdict: Verdict | None = None

    def step(
        self,
        micro_batches: Sequence[Batch],
        counts: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
        tokens: int = 0,
    ) -> Verdict:
        """One step over this rank's rows, applied or not. Collective.

        Args:
            micro_batches: as many as accumulation steps.
            counts: positions per loss term over the global batch [terms], on the host.
            meanwhile: see `Engine.train_step`; not called where there is no target.
            tokens: that were trained on before.
        """
        if not has_targets(counts):
            return self._without_targets(counts)
        self._weights, self._verdict = term_weights(counts, self._objective, tokens), None
        self._engine.train_step(micro_batches, self._weights, self._may_be_applied, meanwhile)
        assert self._verdict is not None
        verdict: Verdict = self._verdict
        if verdict.apart is not None:
            self._apart.optimizer_step += not verdict.apart.reason
        for recent, part in zip(self._recent, (verdict, verdict.apart), strict=True):
            if part is not None and not part.reason and self._settings.spike_zscore > 0:
                assert part.loss is not None
                assert part.gradient_norm is not None
                recent.append([part.loss, part.gradient_norm])
                del recent[: -self._settings.window_steps]
        return verdict

    def _without_targets(self, counts: torch.Tensor) -> Verdict:
        """The engine is not called: with gradients of zero weights would decay and moments fade. The counts are those
        of the global batch, so all ranks come here together.
        """
        nothing = torch.zeros(len(counts) + 1, dtype=torch.float64, device=self._engine.device)
        sums, _, stop = self._exchange(nothing[:-1], nothing[-1:])
        return Verdict(NO_TARGETS, None, None, sums, stop)

    def _may_be_applied(self, sums: torch.Tensor, shares: torch.Tensor) -> list[tuple[bool, float]]:
        sums, norms, stop = self._exchange(sums, shares)
        weights, found = self._weights, []
        for part, norm, recent in zip(terms_of_parts(self._objective), norms, self._recent, strict=False):
            loss = float(weighted_sum(sums[part], weights[part]))
            found.append(ApartVerdict(self._reason(loss, norm, recent), loss, norm))
        base, apart = found[0], found[1] if len(found) > 1 else None
        self._verdict = Verdict(base.reason, base.loss, base.gradient_norm, sums, stop, apart)
        return [(not part.reason, part.gradient_norm) for part in found]

    def _exchange(self, sums: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, list[float], bool]:
        """Term sums over all ranks, on the host; the gradient norms, from every rank's shares of their squares; whether
        a rank was asked to stop. Collective, and the one place where a step waits for the device.
        """
        stop = torch.full((1,), float(self._stop.requested), dtype=sums.dtype, device=sums.device)
        mine = torch.cat([sums / self._dims.tensor_size, shares.to(sums.dtype), stop])
        group = dist.group.WORLD
        assert group is not None
        *found, stops = all_reduce_sum(mine, group).tolist()
        total, squares = found[: len(sums)], found[len(sums) :]
        return torch.tensor(total, dtype=torch.float64), [norm_of(square) for square in squares], stops > 0

    def _reason(self, loss: float, norm: float, recent: list[list[float]]) -> str:
        limit = self._settings.spike_zscore
        for number, (name, value) in enumerate((("loss", loss), ("gradient norm", norm))):
            if not math.isfinite(value):
                return f"{name} is {value}"
            if limit > 0 and len(recent) == self._settings.window_steps:
                score = robust_zscore(value, [step[number] for step in recent])
                if score > limit:
                    return f"{name} {value:.4g} has a z-score of {score:.1f}, above guards.spike_zscore={limit:g}"
        return ""


def robust_zscore(value: float, history: Sequence[float]) -> float:
    """How many deviations `value` lies above the median of `history`; a deviation is 1.4826 median absolute ones."""
    median = statistics.median(history)
    spread = 1.4826 * statistics.median(abs(one - median) for one in history)
    return (value - median) / max(spread, SPREAD_FLOOR * abs(median), 1e-12)
