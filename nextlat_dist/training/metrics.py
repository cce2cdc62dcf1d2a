"""Reports of a run: metrics.jsonl and wandb, written by rank 0, and the arithmetic of MFU and ETA."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nextlat_dist.config.load import config_to_dict
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import without_secrets
from nextlat_dist.files import BATCH_HASHES_FILE, METRICS_FILE, write_whole, writing
from nextlat_dist.parallel.device import peak_tflops
from nextlat_dist.plan.counting import flops_per_token
from nextlat_dist.reporting.console import say
from nextlat_dist.reporting.log import logger

log = logger(__name__)


class NoLog:
    """The log of every rank but the first: of nothing. Its methods are those of `MetricsLog`."""

    def say(self, text: str) -> None:
        pass

    def write_event(self, entry: dict[str, Any]) -> None:
        pass

    def write_batch_hash(self, entry: dict[str, Any]) -> None:
        pass

    def write(self, entry: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class MetricsLog:
    """One JSON object per logged step; a resume drops what a lost run logged after its last checkpoint."""

    def __init__(self, config: RunConfig, output_dir: Path, start_step: int, wandb_id: str | None = None) -> None:
        self._path = output_dir / METRICS_FILE
        self._hashes = output_dir / BATCH_HASHES_FILE
        self._complained = False
        _keep_until(self._path, start_step)
        if config.data.log_batch_hashes:
            _keep_until(self._hashes, start_step)
        self._wandb = _start_wandb(config, output_dir, wandb_id)

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._wandb is not None else None

    def say(self, text: str) -> None:
        """A line for the person who watches the run."""
        say(text)

    def write_event(self, entry: dict[str, Any]) -> None:
        """Something that happened at a step, into the file only."""
        self._append(self._path, entry)

    def write_batch_hash(self, entry: dict[str, Any]) -> None:
        self._append(self._hashes, entry)

    def write(self, entry: dict[str, Any]) -> None:
        self._append(self._path, entry)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in entry.items() if k != "step" and v is not None}, step=entry["step"])

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()

    def _append(self, path: Path, entry: dict[str, Any]) -> None:
        """A full disk costs lines, not the run; it is said once."""
        try:
            with path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            if not self._complained:
                log.warning("%s cannot be written (%s); training continues without these lines", path, error)
            self._complained = True


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, and those that a kill cut short."""
    with writing(path):
        lines = path.read_text(errors="replace").splitlines() if step and path.is_file() else []
        steps = [_step_of(line) for line in lines]
        kept = [line + "\n" for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
        # A kill in between must not cost the lines of the run so far.
        write_whole(path, "".join(kept))


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return None


def _start_wandb(config: RunConfig, output_dir: Path, wandb_id: str | None) -> Any:
    if config.wandb.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    with _typed_without_secrets():
        return wandb.init(
            project=config.wandb.project,
            name=config.wandb.name,
            mode=config.wandb.mode,
            dir=str(output_dir),
            config=config_to_dict(config),
            id=wandb_id,
            resume="allow" if wandb_id else None,
        )


@contextlib.contextmanager
def _typed_without_secrets() -> Iterator[None]:
    """wandb also sends the words of the command line, where a URL may have been typed with its password."""
    typed = sys.argv
    sys.argv = [without_secrets(word) for word in typed]
    try:
        yield
    finally:
        sys.argv = typed


class Throughput:
    """Tokens per second and model FLOP utilisation since the last reading, time outside training left out.

    Attention counts what its causal mask and the documents leave: the pairs of a token and what it attends to.
    """

    def __init__(self, config: RunConfig, devices: int) -> None:
        self._config = config
        peak = config.training.peak_tflops_per_device
        found = (peak, "training.peak_tflops_per_device") if peak else peak_tflops()
        self._peak = found[0] if found is not None else None
        self.peak_source = found[1] if found is not None else ""
        self._devices = devices
        self._tokens = self._attended = 0
        self._since = time.perf_counter()
        self.tokens_per_second = 0.0

    @property
    def reference(self) -> str:
        """What MFU is relative to; empty where none is reported."""
        return f"{self._peak:.3g} TFLOP/s per device ({self.peak_source})" if self._peak else ""

    def count(self, tokens: int, attended: int) -> None:
        """A step of so many positions, which together attend to so many keys."""
        self._tokens += tokens
        self._attended += attended

    def read(self) -> tuple[float, float | None]:
        """(tokens per second, MFU in 0..1 or None without a peak) since `restart` or the last reading."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        self.tokens_per_second = self._tokens / elapsed
        mfu = None
        if self._peak is not None:
            flops = flops_per_token(self._config, self._attended / max(self._tokens, 1))
            mfu = self.tokens_per_second * flops / (self._peak * 1e12 * self._devices)
        self.restart()
        return self.tokens_per_second, mfu

    def restart(self) -> None:
        self._tokens = self._attended = 0
        self._since = time.perf_counter()


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
