"""The calibration of adaptive drafting for an export and a machine: how often drafts are accepted, what they cost.

`nextlat calibrate` measures it and writes `calibration.json` next to the drafter's weights. It steers speed alone: a
wrong calibration drafts too much or too little and never changes the distribution of what is emitted.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nextlat_dist.errors import UserError
from nextlat_dist.files import write_whole
from nextlat_dist.huggingface.drafters.format import CALIBRATION_FILE
from nextlat_dist.huggingface.stored import JsonFields, read_fields

FORMAT_VERSION = 1
CONFIDENCE_LIMIT = 1e-4  # logits of a confidence are taken this far from 0 and 1 at most


@dataclass(frozen=True)
class BatchCosts:
    """Costs at one batch size, in units of a plain step of that batch."""

    begin: float  # what a cycle's first draft step costs beyond the others
    draft: float  # one draft step
    verify: list[float]  # entry n - 1: a cycle's forward over n tokens per row; entry 0 is 1.0


@dataclass(frozen=True)
class Costs:
    """Costs of a cycle in units of one plain step at batch size 1, on the machine that calibrated.

    `draft[rows]` is one draft step of a batch, `begin[rows]` what a cycle's first one costs beyond that (its weights
    have left the caches), `verify[rows][n]` one forward over n tokens per row, with everything that a cycle does
    besides drafting; n = 1 is the plain step.
    """

    draft: dict[int, float]
    verify: dict[int, dict[int, float]]
    begin: dict[int, float] = field(default_factory=lambda: {1: 0.0})

    def at(self, rows: int, longest: int) -> BatchCosts:
        """Costs at `rows` rows for up to `longest` drafts: between measured sizes on a straight line, beyond the last
        on that through the last two, before the first as the first.
        """
        widths = range(1, longest + 2)
        plain = _interpolate({size: line[1] for size, line in self.verify.items()}, rows)
        begin, draft = (_interpolate(part, rows) / plain for part in (self.begin, self.draft))
        verify = [
            _interpolate({size: _interpolate(line, width) for size, line in self.verify.items()}, rows) / plain
            for width in widths
        ]
        return BatchCosts(begin, draft, verify)


def _interpolate(points: dict[int, float], at: int) -> float:
    measured = sorted(points)
    if at <= measured[0] or len(measured) == 1:
        return points[measured[0]]
    right = min(bisect_left(measured, at), len(measured) - 1)
    low, high = measured[right - 1], measured[right]
    share = (at - low) / (high - low)
    return max(points[low] + share * (points[high] - points[low]), min(points.values()))


@dataclass(frozen=True)
class Acceptance:
    """How drafts fare at one sampling temperature, with tokens cut by top_k and top_p where they were.

    `by_position[i]` is the share accepted of the drafts at position i + 1 whose predecessors were accepted.
    `confidence` are the weights w of logit P(accept) = w0 + w1 · logit(largest draft probability) + w2 · log(position).
    """

    temperature: float
    by_position: list[float]
    confidence: list[float]
    top_k: int = 0
    top_p: float = 1.0

    def given(self, confidence: float, position: int) -> float:
        """P(accept) of the draft at `position` ≥ 1, given the predecessors' acceptance and the drafter's confidence."""
        confidence = min(max(confidence, CONFIDENCE_LIMIT), 1 - CONFIDENCE_LIMIT)
        w0, w1, w2 = self.confidence
        return 1 / (1 + math.exp(-(w0 + w1 * math.log(confidence / (1 - confidence)) + w2 * math.log(position))))


@dataclass(frozen=True)
class Calibration:
    """`device` is the type of device that costs were measured on, `measured_on` says what else they depend on: the
    processor or GPU, threads, dtype.

    `costs` are those of greedy cycles and `sampled_costs` those of cycles that sample; None: the same.
    """

    device: str
    costs: Costs
    acceptance: list[Acceptance]
    measured_on: dict[str, Any] = field(default_factory=dict)
    sampled_costs: Costs | None = None

    def costs_at(self, temperature: float) -> Costs:
        return self.costs if temperature == 0 or self.sampled_costs is None else self.sampled_costs

    def acceptance_at(self, temperature: float) -> Acceptance:
        """That of the calibrated temperature nearest to `temperature`."""
        return min(self.acceptance, key=lambda a: abs(a.temperature - temperature))

    def save(self, directory: Path) -> Path:
        """Write `directory/calibration.json`, whole or not at all."""
        path = directory / CALIBRATION_FILE
        write_whole(path, json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n")
        return path

    @staticmethod
    def load(directory: Path) -> Calibration | None:
        """The calibration in a drafter's `directory`; None if there is none.

        Raises:
            UserError: the file is damaged or of another release.
        """
        path = directory / CALIBRATION_FILE
        if not path.is_file():
            return None
        try:
            return _read(read_fields(path, ""))
        except UserError as error:
            reason = str(error).removeprefix(f"{path} ").rstrip("; ")
            raise UserError(
                f"{path} is not a calibration of format_version {FORMAT_VERSION}, it {reason}; write it again with "
                "`nextlat calibrate`"
            ) from None


def _read(fields: JsonFields) -> Calibration:
    fields.integer("format_version", minimum=FORMAT_VERSION, maximum=FORMAT_VERSION)
    costs = _all_costs(fields.object("costs"))
    sampled = fields.values.get("sampled_costs")  # older files have none
    sampled_costs = None if sampled is None else _all_costs(fields.object("sampled_costs"))
    acceptance = [
        Acceptance(
            entry.number("temperature", minimum=0),
            entry.numbers("by_position", minimum=0, maximum=1),
            entry.numbers("confidence"),
            entry.integer("top_k", minimum=0) if "top_k" in entry else 0,
            entry.number("top_p", minimum=0, maximum=1) if "top_p" in entry else 1.0,
        )
        for entry in fields.objects("acceptance")
    ]
    if not acceptance or not all(entry.by_position and len(entry.confidence) == 3 for entry in acceptance):
        raise fields.wrong("acceptance", "have a temperature, shares by position and three weights in every entry")
    measured_on = dict(fields.object("measured_on").values) if "measured_on" in fields else {}
    return Calibration(
        fields.text("device"),
        costs,
        acceptance,
        measured_on,
        sampled_costs,
    )


def _all_costs(costs: JsonFields) -> Costs:
    verify = costs.object("verify")
    by_rows = {rows: _costs(verify, str(rows), above=0) for rows in _counts(verify)}
    for rows, line in by_rows.items():
        if 1 not in line:
            raise verify.wrong(str(rows), "have the cost of 1 token, the plain step")
    return Costs(_costs(costs, "draft"), by_rows, _costs(costs, "begin"))


def _counts(fields: JsonFields) -> list[int]:
    """The keys, which are numbers of rows or tokens."""
    for key in fields.values:
        if not (key.isascii() and key.isdecimal() and 0 < len(key) < 10 and int(key) > 0 and str(int(key)) == key):
            raise UserError(f"{fields.path} has {fields.within}{key}, but keys there must be whole numbers ≥ 1")
    if not fields.values:
        raise UserError(f"{fields.path} has nothing in {fields.within.rstrip('.')}")
    return sorted(map(int, fields.values))


def _costs(fields: JsonFields, key: str, above: float = -math.inf) -> dict[int, float]:
    line = fields.object(key)
    return {count: line.number(str(count), minimum=0, above=above) for count in _counts(line)}
