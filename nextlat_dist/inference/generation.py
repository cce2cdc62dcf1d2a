"""Requests to decoding and what it gives back: continuations, their pieces, and cycles for measurements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextlat_dist.inference.sampling import Sampling
from nextlat_dist.inference.stopping import Stops

DraftLength = int | Literal["adaptive"]


@dataclass
class Generation:
    """The continuation of one prompt.

    `token_ids` includes the token that ended it, if one did; `from_draft` says of each whether it was drafted and
    accepted or picked by the base model; `text` ends before a stop string and is None for prompts given as ids. A
    *cycle* is one forward after the prefill: it emits the drafted tokens that were accepted and one more, which costs
    no draft. `drafted_by_position` and `accepted_by_position` count drafted tokens (an accepted one that falls after
    the end is not counted). Seconds are those of the whole batch until this row had its first, and its last token.

    `near_ties` are positions of greedy text in half precision (bf16, fp16) where the best two logits are nearer than
    half precision resolves. Hidden states are rounded to it, so that another draft length or batch size may go on with
    the other token from there (seldom from elsewhere): both are greedy text of the model.
    """

    token_ids: list[int] = field(default_factory=list)
    from_draft: list[bool] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = "length"  # "stop": a stop token or string; "length": max_new_tokens or the context limit
    cycles: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    near_ties: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0  # includes picking the first token
    decode_seconds: float = 0.0

    @property
    def drafted(self) -> int:
        return sum(self.drafted_by_position)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_by_position)

    def count(self, drafted: int, accepted: int) -> None:
        """Note one cycle."""
        self.cycles += 1
        missing = [0] * (drafted - len(self.drafted_by_position))
        self.drafted_by_position += missing
        self.accepted_by_position += missing
        for position in range(drafted):
            self.drafted_by_position[position] += 1
            self.accepted_by_position[position] += position < accepted


@dataclass(frozen=True)
class Piece:
    """What the prefill or a cycle adds to row `row`: its first `accepted` tokens were drafted."""

    row: int
    token_ids: list[int]
    accepted: int


@dataclass(frozen=True)
class Cycle:
    """A cycle as seen from outside, for measurements. Lists have one entry per row that took part.

    `confidences` are the largest probabilities that each of a row's drafts could be drawn with.
    """

    rows: list[int]
    confidences: list[list[float]]
    accepted: list[int]
    draft_seconds: float
    verify_seconds: float  # the base model's forward, and picking tokens
    seconds: float


@dataclass(frozen=True)
class Request:
    """What all rows of a call share."""

    max_new_tokens: int
    draft_length: DraftLength
    sampling: Sampling
    stops: Stops
