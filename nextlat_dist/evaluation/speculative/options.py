"""Options of a measurement of self-speculative decoding, with their flags and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nextlat_dist.errors import UserError
from nextlat_dist.reporting.options import integers, numbers

FIXED_LENGTHS = tuple(range(11))
Length = int | Literal["adaptive"]


def draft_lengths_of(text: str) -> tuple[Length, ...]:
    """`0..3,adaptive` -> (0, 1, 2, 3, "adaptive")."""
    lengths: list[Length] = []
    for part in text.split(","):
        lengths += ["adaptive"] if part == "adaptive" else integers(part)
    return tuple(lengths)


def _of_command(flag: str, parse: object, metavar: str, about: str, **more: str) -> dict[str, object]:
    return {"flag": flag, "parse": parse, "metavar": metavar, "help": about, **more}


@dataclass(frozen=True)
class Options:
    """`draft_lengths` None: 0 to 10, and adaptive if the main export is calibrated."""

    draft_lengths: tuple[Length, ...] | None = field(
        default=None,
        metadata=_of_command(
            "--draft-length",
            draft_lengths_of,
            "0..10,adaptive",
            "tokens drafted per cycle; 0, the baseline, is always added",
            default="0..10, and adaptive if the first export is calibrated",
        ),
    )
    temperatures: tuple[float, ...] = field(
        default=(0.0, 1.0), metadata=_of_command("--temperature", numbers, "0,0.6,1", "0: greedy")
    )
    batch_sizes: tuple[int, ...] = field(
        default=(1,),
        metadata=_of_command(
            "--batch-size", integers, "1,8,32", "prompts decoded together; a domain with fewer repeats them"
        ),
    )
    max_new_tokens: int = field(default=128, metadata={"metavar": "N", "help": "of every continuation"})
    prompts_per_domain: int = field(default=8, metadata={"metavar": "N", "help": "the first ones of each domain"})
    prompt_tokens: int | None = field(
        default=None, metadata={"metavar": "N", "help": "cut prompts to that many tokens", "default": "whole prompts"}
    )
    repeats: int = field(default=1, metadata={"metavar": "N", "help": "passes over the prompts, with further seeds"})
    seed: int = field(default=0, metadata={"metavar": "N", "help": "of sampled tokens"})
    hugging_face: bool = field(
        default=False, metadata={"help": "also run transformers' generate, without and with prompt lookup"}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(sorted(set(self.temperatures))))
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))
        if self.repeats < 1 or self.max_new_tokens < 2 or not self.temperatures:
            raise UserError(
                f"repeats is {self.repeats}, max_new_tokens {self.max_new_tokens} and temperature has "
                f"{len(self.temperatures)} entries, but there must be at least 1 repeat, 2 new tokens (the prefill "
                "writes the first) and 1 temperature; change the one that is lower"
            )
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise UserError(f"batch_size is {list(self.batch_sizes)}, but needs numbers ≥ 1; change batch_size")
        if self.prompt_tokens is not None and self.prompt_tokens < 2:
            raise UserError(
                f"prompt_tokens is {self.prompt_tokens}, but must be ≥ 2 (BOS counts); change prompt_tokens"
            )
        if self.draft_lengths is not None:
            object.__setattr__(self, "draft_lengths", _sorted(self.draft_lengths))


def _sorted(wanted: tuple[Length, ...]) -> tuple[Length, ...]:
    """The fixed lengths in order, 0 first; then "adaptive"."""
    fixed = sorted({0, *(length for length in wanted if isinstance(length, int))})
    if fixed[0] < 0:
        raise UserError(f"a draft length is {fixed[0]}, but must be ≥ 0; change draft_length")
    lengths: tuple[Length, ...] = (*fixed, "adaptive") if "adaptive" in wanted else tuple(fixed)
    if len(lengths) < 2:
        raise UserError('draft_length is 0 alone, the baseline; add lengths to it, such as 1..10 or "adaptive"')
    return lengths
