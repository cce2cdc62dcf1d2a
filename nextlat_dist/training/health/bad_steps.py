"""Steps that were not applied: they are recorded, and too many bad ones in a row restore the last checkpoint's weights.

A step without a target is recorded too, and is not a bad one: nothing is wrong with the weights.

Restoring undoes the applied steps since that checkpoint too, which led to where nothing works any more; so their rows
are left out as well. The data, the step number and the learning rate continue, only weights, optimizer and random state
are the checkpoint's. Invariant: `TrainerState.skipped` lists all rows that are not in the weights; a run that is
killed and resumed does the same again, because what it decides from is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextlat_dist.checkpoint.commit import step_name, verify_together
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.errors import UserError
from nextlat_dist.files import CHECKPOINTS_FOLDER
from nextlat_dist.parallel.dims import ParallelDims
from nextlat_dist.training.engine.protocol import Engine
from nextlat_dist.training.health.guards import ApartVerdict, Verdict
from nextlat_dist.training.metrics import MetricsLog, NoLog
from nextlat_dist.training.state.resume import resume_state
from nextlat_dist.training.state.trainer_state import TrainerState, read_state


class BadSteps:
    """The bad steps of one run.

    Attributes:
        last_saved: step of the checkpoint to go back to; 0: there is none.
    """

    def __init__(
        self, config: RunConfig, dims: ParallelDims, engine: Engine, state: TrainerState, log: MetricsLog | NoLog
    ) -> None:
        self._config, self._dims, self._engine, self._state, self._log = config, dims, engine, state, log
        self._rewound_to = 0
        self.last_saved = state.step

    def note(self, verdict: Verdict, before: Mapping[str, int], after: Mapping[str, int]) -> bool:
        """Write down that the step that ends at `state.step` was not applied; whether it is time to go back.

        Args:
            before, after: rows taken of each source when it began and now, on the rank that logs.
        """
        state, limit = self._state, self._config.guards.max_bad_steps
        rows = self._skip_from(state.step - 1)
        state.bad_steps += verdict.bad
        warning = "" if verdict.bad else "warning: "
        self._tell(
            f"{warning}skipped, rows {rows[0]} to {rows[1]}: {verdict.reason}",
            {
                "skipped_step": {
                    "reason": verdict.reason,
                    "loss": _json_number(verdict.loss),
                    "gradient_norm": _json_number(verdict.gradient_norm),
                    "rows": rows,
                    "source_rows": _ranges(before, after),
                }
            },
        )
        return verdict.bad and 0 < limit <= state.bad_steps

    def note_apart(self, verdict: ApartVerdict) -> None:
        """Write down that what is trained apart did not learn from the step that ends at `state.step`. The base did, so
        nothing else comes of it.
        """
        name = self._config.objective.apart
        self._tell(
            f"{name} not updated: {verdict.reason}",
            {
                f"skipped_step/{name}": {
                    "reason": verdict.reason,
                    "loss": _json_number(verdict.loss),
                    "gradient_norm": _json_number(verdict.gradient_norm),
                }
            },
        )

    def rewind(self, after: Mapping[str, int]) -> None:
        """Load the last checkpoint and leave out all rows since. Collective; no save may be under way.

        Raises:
            UserError: on every rank, when there is no checkpoint, or it was gone back to before.
        """
        state, to = self._state, self.last_saved
        if to in (0, self._rewound_to):
            first, end = state.skipped[-1]
            raise UserError(
                f"training cannot continue: {state.bad_steps} steps in a row up to step {state.step} were bad and "
                + ("there is no checkpoint yet to go back to" if to == 0 else f"so they were since step {to} before")
                + f"; lower optimizer.lr, look at rows {first} to {end} (see metrics.jsonl), or change guards",
                shared=True,
            )
        checkpoint = Path(self._config.output_dir) / CHECKPOINTS_FOLDER / step_name(to)
        verify_together(checkpoint)
        saved = read_state(checkpoint)
        resume_state(self._dims, self._engine, checkpoint, saved)
        rows = self._skip_from(to)
        state.recent[:], state.apart.recent[:] = saved.recent, saved.apart.recent
        state.apart.optimizer_step = saved.apart.optimizer_step
        bad, state.bad_steps, self._rewound_to = state.bad_steps, 0, to
        self._tell(
            f"{bad} bad steps in a row: back to the weights of step {to}, on after rows {rows[0]} to {rows[1]}",
            {"rewound": {"to_step": to, "rows": rows, "source_rows": _ranges(saved.cursor["taken"], after)}},
        )

    def _skip_from(self, step: int) -> list[int]:
        """Rows since the end of `step`, from now on among those left out."""
        batch = self._config.training.global_batch_size
        rows = [step * batch, self._state.step * batch]
        add_range(self._state.skipped, *rows)
        return rows

    def _tell(self, text: str, event: dict[str, Any]) -> None:
        self._log.say(f"step {self._state.step}  {text}")
        self._log.write_event({"step": self._state.step, **event})


def add_range(ranges: list[list[int]], first: int, end: int) -> None:
    """Add rows [first, end) to increasing `ranges`, in place; what touches or overlaps the last ones is joined."""
    while ranges and ranges[-1][1] >= first:
        first = min(first, ranges.pop()[0])
    ranges.append([first, end])


def _ranges(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, list[int]]:
    return {name: [before.get(name, 0), end] for name, end in after.items() if end > before.get(name, 0)}


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
