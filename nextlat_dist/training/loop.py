"""The training loop: batch, step, log, validate, save. One screen; everything else is a named call."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nextlat_dist.checkpoint.writer import SaveOutcome
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError
from nextlat_dist.objective.terms import named_terms, number_of_terms, terms_text
from nextlat_dist.parallel.device import pending_work, take_peak_memory
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.training.batches import BatchSource, GlobalBatch
from nextlat_dist.training.cut_documents import CutDocuments
from nextlat_dist.training.engine.optimizer import learning_rate
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.health.bad_steps import BadSteps
from nextlat_dist.training.health.guards import StepGuard, learnt_terms
from nextlat_dist.training.health.signals import StopRequest
from nextlat_dist.training.health.watchdog import Watchdog, slowest
from nextlat_dist.training.metrics import MetricsLog, NoLog, Throughput, format_duration
from nextlat_dist.training.state.saving import Saver
from nextlat_dist.training.state.trainer_state import TrainerState
from nextlat_dist.training.validation import ValidationSet


class Trainer:
    """One run on this rank.

    Attributes:
        last_metrics: the loss terms that were reported last, and those of the last validation as `validation_…`.
    """

    def __init__(
        self,
        config: RunConfig,
        dims: ParallelDims,
        engine: Engine,
        state: TrainerState,
        train: BatchSource,
        validation: ValidationSet | None,
        log: MetricsLog | NoLog,
        saver: Saver,
        stop: StopRequest,
    ) -> None:
        self.config, self.dims, self.engine, self.state = config, dims, engine, state
        self._train, self._validation, self._log, self._saver = train, validation, log, saver
        self._guard = StepGuard(config.guards, config.objective, dims, engine, state.recent, stop, state.apart)
        self._bad_steps = BadSteps(config, dims, engine, state, log)
        self._watchdog = Watchdog(
            Path(config.output_dir),
            dims.rank,
            dims.world_size,
            config.watchdog.timeout_seconds,
            pending_work(engine.device),
        )
        self._throughput = Throughput(config, dims.world_size)
        self._cut = CutDocuments(config, log)
        self._sums: Any = 0  # global term sums and counts [terms] of the applied steps since the last report
        self._counts: Any = 0
        self._without_targets = 0  # steps since the last report that had no target
        self._timed_steps = 0  # since the clocks were started
        self._norm = self._apart_norm = self._rate = 0.0  # of the last applied step
        self._taken: dict[str, int] = {}  # rows of each source before the batch under way
        self.last_metrics: dict[str, float | None] = {}

    def run(self) -> bool:
        """Train from `state.step` to the end, then validate and save. Whether a rank was asked to stop before the end.

        Raises:
            UserError: on every rank, when the last save failed or training diverged.
        """
        config, state = self.config, self.state
        total, stop = config.total_steps, False
        throughput = self._throughput
        if self._reached():
            target = f"training.target_loss={config.training.target_loss}"
            self._log.say(f"{target} was reached, with {state.validation_loss:.4g}; lower it to train on")
        elif state.step == total:
            self._log.say(f"all {total} steps of this run are done; raise training.train_tokens to train on")
        if throughput.reference:
            self._log.say(f"MFU is relative to {throughput.reference}")
        with self._watchdog:
            self._restart_clocks()
            while state.step < total and not stop and not self._reached():
                stop = self._step(self._next_batch())
                done = state.step == total
                save = stop or self._due(config.checkpoint.save_interval, done)
                # Skip validation when a stop was requested: saving comes first.
                validate = (done or not stop) and self._due(config.training.validation_interval, done)
                may_save = save or (validate and config.training.target_loss is not None)
                # Also before a save, so that a checkpoint never falls inside an average.
                if may_save or state.step == 1 or state.step % config.training.log_interval == 0:
                    self._report()
                if done or stop:
                    self._cut.warn_at_the_end(state.step)
                if validate:
                    self._validate()
                    if self._reached() and not done:
                        self._cut.warn_at_the_end(state.step)
                self._report_saves(self._saver.outcomes())
                if save or self._reached():
                    self._save()
            last = self._finish_saves()
        if last and last[-1].error:
            raise UserError(last[-1].error, shared=True)
        return state.step < total and not self._reached()

    def _next_batch(self) -> GlobalBatch:
        """The next batch; what was lost in it, and its hash where asked for, are logged."""
        self._watchdog.beat(self.state.step + 1, "reading data")
        self._taken = self._rows_taken()
        with self.engine.time_split.part("data"):
            batch = self._train.next()
        step, row = self.state.step + 1, self.state.step * self.config.training.global_batch_size
        for loss in batch.losses:
            self._log.say(f"step {step}  quarantined a record of source {loss.source}: {loss.reason}")
            self._log.write_event({"step": step, "quarantined": asdict(loss)})
        self._cut.note(batch, step)
        if batch.digest:
            self._log.write_batch_hash({"step": step, "row": row, "sha256": batch.digest})
        return batch

    def _step(self, batch: GlobalBatch) -> bool:
        """Train on a batch or skip it; whether a rank was asked to stop."""
        config, state = self.config, self.state
        self._watchdog.beat(state.step + 1, "training step")
        rate = learning_rate(state.tokens, config.training.train_tokens, config.optimizer.lr, config.schedule)
        self.engine.set_learning_rate(rate)
        ahead = self._prepare if state.step + 1 < config.total_steps else None
        verdict = self._guard.step(batch.micro_batches, batch.counts, ahead, state.tokens)
        state.step += 1
        state.tokens += config.tokens_per_step
        self._throughput.count(config.tokens_per_step, batch.attended)
        self._timed_steps += 1
        if verdict.reason:
            self._without_targets += not verdict.bad
            if self._bad_steps.note(verdict, self._taken, self._rows_taken()):
                self._finish_saves()
                self._bad_steps.rewind(self._rows_taken())
        else:
            sums, counts = learnt_terms(verdict, batch.counts, config.objective)
            self._sums, self._counts = self._sums + sums, self._counts + counts
            assert verdict.gradient_norm is not None
            self._norm, self._rate = verdict.gradient_norm, rate
            state.bad_steps = 0
        if verdict.apart is not None and verdict.apart.reason:
            self._bad_steps.note_apart(verdict.apart)
        elif verdict.apart is not None:
            self._apart_norm = verdict.apart.gradient_norm
        return verdict.stop

    def _prepare(self) -> None:
        """Read ahead while the device works on this step."""
        self._watchdog.beat(self.state.step + 1, "reading data ahead")
        with self.engine.time_split.part("data"):
            self._train.prepare()
        self._watchdog.beat(self.state.step + 1, "training step")

    def _due(self, interval: int, done: bool) -> bool:
        return done or (interval > 0 and self.state.step % interval == 0)

    def _rows_taken(self) -> dict[str, int]:
        progress = self._train.progress
        return dict(progress.cursor.taken) if progress is not None else {}

    def _report(self) -> None:
        """Log the loss terms as means over all applied steps since the last report: null where no step had a target,
        nothing where all were bad.
        """
        slow, resources = self._resources()
        speed, utilisation = self._throughput.read()
        sums, counts, without = self._sums, self._counts, self._without_targets
        self._sums = self._counts = self._without_targets = 0
        applied = not isinstance(counts, int)
        if not applied:
            if not without:
                return
            sums = counts = torch.zeros(number_of_terms(self.config.objective), dtype=torch.float64)
        terms = named_terms(sums, counts, self.config.objective, self.state.tokens - self.config.tokens_per_step)
        self.last_metrics |= terms
        state, total, apart = self.state, self.config.total_steps, self.config.objective.apart
        self._log.write(
            {
                "step": state.step,
                "tokens": state.tokens,
                **terms,
                "gradient_norm": self._norm if applied else None,
                **({f"gradient_norm/{apart}": self._apart_norm} if apart is not None else {}),
                "learning_rate": self._rate if applied else None,
                **({"steps_without_targets": without} if without else {}),
                "tokens_per_second": speed,
                "mfu": utilisation,
                **({"straggler_rank": slow[0], "straggler_ratio": slow[1]} if slow is not None else {}),
                **resources,
                **self._data_progress(),
                **self._cut.since_last(),
                "time": time.time(),
            }
        )
        left = (total - state.step) * self.config.tokens_per_step / speed
        mfu = "" if utilisation is None else f"  MFU {utilisation:.1%}"
        how = f"grad norm {self._norm:.3f}  lr {self._rate:.2e}" if applied else "no step applied"
        self._log.say(
            f"step {state.step}/{total}  {terms_text(terms)}  {how}  "
            f"{speed:,.0f} tokens/s{mfu}  ETA {format_duration(left)}"
        )

    def _resources(self) -> tuple[tuple[int, float] | None, dict[str, Any]]:
        """The slowest rank, see `slowest`; of the steps since the last report the seconds of each part, means over
        steps and ranks, and the peak of memory of every rank. Collective.
        """
        split, steps = self.engine.time_split.read(), self._timed_steps
        self._timed_steps = 0
        peak = take_peak_memory(self.engine.device) / 1e9
        mine = [self._watchdog.take_busy_seconds(), peak, *split.values()]
        busy, peaks, *parts = zip(*_of_all_ranks(mine, self.dims, self.engine.device), strict=True)
        means = (sum(part) / len(part) / max(steps, 1) for part in parts)
        resources = {f"seconds/{name}": mean for name, mean in zip(split, means, strict=True)}
        return slowest(busy), {**resources, "peak_memory_gigabytes": list(peaks)}

    def _data_progress(self) -> dict[str, float]:
        """On a reader: passes over each source, its share of the rows to come, and records replaced by padding."""
        progress = self._train.progress
        if progress is None:
            return {}
        quarantined = sum(len(records) for records in progress.cursor.quarantined.values())
        epochs = {f"epoch/{name}": passes for name, passes in progress.epochs.items()}
        shares = progress.shares if len(epochs) > 1 else {}
        return {**epochs, **{f"share/{k}": v for k, v in shares.items()}, "quarantined_records": quarantined}

    def _validate(self) -> None:
        if self._validation is None:
            return
        self._watchdog.beat(self.state.step, "validation")
        terms = self._validation.evaluate(self.engine, self.config, self.dims, self.state.tokens)
        entry = {f"validation_{name}": value for name, value in terms.items()}
        self.last_metrics |= entry
        self.state.validation_loss = terms[self.config.objective.entry.decoded_term]
        self._log.write({"step": self.state.step, "tokens": self.state.tokens, **entry})
        self._log.say(f"step {self.state.step}  validation  {terms_text(terms)}")
        if self._reached():
            self._log.say(f"training.target_loss={self.config.training.target_loss} is reached: the run ends here")
        if terms["loss"] is None:
            self._log.say(
                "warning: no token of the validation batches is a training target; there is no loss to report"
            )
        self._restart_clocks()

    def _reached(self) -> bool:
        """Whether a validation has reached `training.target_loss`, the one that this run asks for."""
        target, reached = self.config.training.target_loss, self.state.validation_loss
        return target is not None and reached is not None and reached <= target

    def _restart_clocks(self) -> None:
        self._throughput.restart()
        self.engine.time_split.restart()
        self._timed_steps = 0
        self._watchdog.take_busy_seconds()

    def _save(self) -> None:
        self._watchdog.beat(self.state.step, "saving")
        if self._train.progress is not None:
            self.state.cursor = self._train.progress.cursor.to_json()
        self._saver.save(self.state)
        self._restart_clocks()

    def _finish_saves(self) -> list[SaveOutcome]:
        self._watchdog.beat(self.state.step, "saving")
        outcomes = self._saver.finish()
        self._report_saves(outcomes)
        return outcomes

    def _report_saves(self, outcomes: list[SaveOutcome]) -> None:
        """A save that failed costs no training: the next one may go through."""
        for outcome in outcomes:
            if not outcome.error:
                self._bad_steps.last_saved = outcome.step
            if outcome.error:
                self._log.say(f"warning: {outcome.error}")
                self._log.write_event({"step": self.state.step, "failed_save": asdict(outcome)})
            else:
                self._log.say(f"step {outcome.step}  checkpoint saved")


def _of_all_ranks(values: list[float], dims: ParallelDims, device: torch.device) -> list[list[float]]:
    """The values of every rank, by rank. Collective."""
    group = dist.group.WORLD
    assert group is not None
    all_values = torch.zeros(dims.world_size, len(values), dtype=torch.float64)
    all_values[dims.rank] = torch.tensor(values, dtype=torch.float64)
    return list(all_reduce_sum(all_values.to(device), group).tolist())
