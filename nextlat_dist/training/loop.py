"""The training loop: batch, step, log, validate, save. One screen; everything else is a named call."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from nextlat_dist.checkpoint.writer import Outcome
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError
from nextlat_dist.objective.terms import named_terms, term_weights
from nextlat_dist.parallel.dims import ParallelDims, all_reduce_sum
from nextlat_dist.training.batches import BatchSource, GlobalBatch
from nextlat_dist.training.build import Engine
from nextlat_dist.training.metrics import MetricsLog, Throughput, format_duration
from nextlat_dist.training.optimizer import learning_rate, set_learning_rate
from nextlat_dist.training.state import Saver, TrainerState


class Trainer:
    """One run on this rank. `log` is None on every rank but the first."""

    def __init__(
        self,
        config: RunConfig,
        dims: ParallelDims,
        engine: Engine,
        state: TrainerState,
        train: BatchSource,
        validation: ValidationSet | None,
        log: MetricsLog | None,
        saver: Saver,
    ) -> None:
        self.config, self.dims, self.engine, self.state = config, dims, engine, state
        self._train, self._validation, self._log, self._saver = train, validation, log, saver
        self._throughput = Throughput(config, dims.world_size)
        self._sums: Any = 0  # term sums and counts [1 + 2d] since the last report
        self._counts: Any = 0

    def run(self) -> None:
        """Train from `state.step` to the end, then validate and save."""
        config, state = self.config, self.state
        total = config.total_steps
        if self._log is not None:
            print(f"MFU is relative to {self._throughput.peak:.3g} TFLOP/s per device ({self._throughput.peak_source})")
        self._throughput.restart()
        while state.step < total:
            rate = self._step(self._next_batch())
            done = state.step == total
            save = self._due(config.checkpoint.save_interval, done)
            # Also before a save, so that a checkpoint never falls inside an average.
            if save or state.step == 1 or state.step % config.training.log_interval == 0:
                self._report(rate)
            if self._due(config.training.validation_interval, done) and self._validation is not None:
                self._validate(self._validation)
            self._report_saves(self._saver.outcomes())
            if save:
                self._save()
        last = self._saver.finish()
        self._report_saves(last)
        if last and last[-1].error:
            raise UserError(last[-1].error, shared=True)

    def _next_batch(self) -> GlobalBatch:
        """The next batch; what was lost in it, and its hash where asked for, are logged."""
        batch = self._train.next()
        if self._log is not None:
            step, row = self.state.step + 1, self.state.step * self.config.training.global_batch_size
            for loss in batch.losses:
                print(f"step {step}  quarantined a record of source {loss.source}: {loss.reason}", flush=True)
                self._log.write_event({"step": step, "quarantined": asdict(loss)})
            if batch.digest:
                self._log.write_batch_hash({"step": step, "row": row, "sha256": batch.digest})
        return batch

    def _step(self, batch: GlobalBatch) -> float:
        config, state = self.config, self.state
        rate = learning_rate(state.tokens, config.training.train_tokens, config.optimizer.lr, config.schedule)
        set_learning_rate(self.engine.optimizer, rate)
        self._sums = self._sums + self.engine.train_step(
            batch.micro_batches, term_weights(batch.counts, config.objective)
        )
        self._counts = self._counts + batch.counts
        state.step += 1
        state.tokens += config.tokens_per_step
        self._throughput.count(config.tokens_per_step)
        return rate

    def _due(self, interval: int, done: bool) -> bool:
        return done or (interval > 0 and self.state.step % interval == 0)

    def _report(self, rate: float) -> None:
        """Log the loss terms as means over everything since the last report."""
        terms = named_terms(_over_all_ranks(self._sums, self.dims), self._counts, self.config.objective)
        self._sums, self._counts = 0, 0
        norm = self.engine.gradient_norm()
        speed, utilisation = self._throughput.read()
        if self._log is None:
            return
        state, total = self.state, self.config.total_steps
        self._log.write(
            {
                "step": state.step,
                "tokens": state.tokens,
                **terms,
                "gradient_norm": norm,
                "learning_rate": rate,
                "tokens_per_second": speed,
                "mfu": utilisation,
                **self._data_progress(),
                "time": time.time(),
            }
        )
        left = (total - state.step) * self.config.tokens_per_step / speed
        text = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
        print(
            f"step {state.step}/{total}  {text}  grad norm {norm:.3f}  lr {rate:.2e}  "
            f"{speed:,.0f} tokens/s  MFU {utilisation:.1%}  ETA {format_duration(left)}",
            flush=True,
        )

    def _data_progress(self) -> dict[str, float]:
        """Passes over each source, its share of the rows to come, and how many records padding stands for."""
        loader = self._train.loader
        assert loader is not None
        quarantined = sum(len(records) for records in loader.cursor.quarantined.values())
        progress = {f"epoch/{name}": epochs for name, epochs in loader.epochs().items()}
        shares = loader.shares if len(progress) > 1 else {}
        return {**progress, **{f"share/{k}": v for k, v in shares.items()}, "quarantined_records": quarantined}

    def _validate(self, validation: ValidationSet) -> None:
        terms = validation.evaluate(self.engine, self.config, self.dims)
        if self._log is not None:
            entry = {f"validation_{name}": value for name, value in terms.items()}
            self._log.write({"step": self.state.step, "tokens": self.state.tokens, **entry})
            text = "  ".join(f"{name} {value:.4f}" for name, value in terms.items())
            print(f"step {self.state.step}  validation  {text}", flush=True)
        self._throughput.restart()

    def _save(self) -> None:
        if self._train.loader is not None:
            self.state.cursor = self._train.loader.cursor.to_json()
        self._saver.save(self.state)
        self._throughput.restart()

    def _report_saves(self, outcomes: list[Outcome]) -> None:
        """A save that failed costs no training: the next one may go through."""
        for outcome in outcomes:
            if self._log is None:
                continue
            if outcome.error:
                print(f"warning: {outcome.error}", flush=True)
                self._log.write_event({"step": self.state.step, "failed_save": asdict(outcome)})
            else:
                print(f"step {outcome.step}  checkpoint saved", flush=True)


class ValidationSet:
    """The same batches every time, kept in memory: the first rows of the validation dataset in stored order."""

    def __init__(self, source: BatchSource, batches: int) -> None:
        self._batches = [source.next() for _ in range(batches)]

    def evaluate(self, engine: Engine, config: RunConfig, dims: ParallelDims) -> dict[str, float]:
        """Loss terms over all batches together, each a mean over what counts. Collective."""
        sums: Any = 0
        counts: Any = 0
        for batch in self._batches:
            sums = sums + engine.evaluate(batch.micro_batches)
            counts = counts + batch.counts
        return named_terms(_over_all_ranks(sums, dims), counts, config.objective)


def _over_all_ranks(sums: torch.Tensor, dims: ParallelDims) -> torch.Tensor:
    """Global term sums from every rank's; tensor-parallel ranks all hold the same ones."""
    group = dist.group.WORLD
    assert group is not None
    return all_reduce_sum(sums.clone(), group) / dims.tensor_size
