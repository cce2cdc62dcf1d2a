"""The progress of a run, as its checkpoints keep it, and the configuration they were saved with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nextlat_dist.config.load import config_from_dict
from nextlat_dist.config.schema import RunConfig
from nextlat_dist.data.loader import Cursor
from nextlat_dist.files import CONFIG_FILE, TRAINER_STATE_FILE


@dataclass
class ApartState:
    """Of what is trained apart from the base; see the fields of the same names below."""

    optimizer_step: int = 0
    recent: list[list[float]] = field(default_factory=list)


@dataclass
class TrainerState:
    """A few numbers that know nothing of ranks."""

    step: int = 0
    tokens: int = 0
    cursor: dict[str, Any] = field(default_factory=lambda: Cursor().to_json())  # position in the data, kept by rank 0
    datasets: dict[str, str] = field(default_factory=dict)  # manifest digest of each source
    wandb_id: str | None = None
    optimizer_step: int = 0  # steps that Adam has taken
    skipped: list[list[int]] = field(default_factory=list)  # global rows [first, end) that are not in the weights
    bad_steps: int = 0  # skipped steps since the last applied one
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of applied steps, for spikes
    validation_loss: float | None = None  # of the next token, as decoding has it, at the last validation
    apart: ApartState = field(default_factory=ApartState)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def read_state(checkpoint: Path) -> TrainerState:
    """Where the run that wrote `checkpoint` was."""
    raw = json.loads((checkpoint / TRAINER_STATE_FILE).read_text())
    return TrainerState(**{**raw, "apart": ApartState(**raw.get("apart", {}))})


def saved_config(checkpoint: Path) -> RunConfig:
    """The configuration of the run that wrote `checkpoint`."""
    return config_from_dict(yaml.safe_load((checkpoint / CONFIG_FILE).read_text()))
