"""Reads what a launcher tells its ranks in environment variables, without torch.

A number that is none is a user's mistake (a job script's typo, a variable of another tool), so it gets a sentence.
"""

from __future__ import annotations

import os

from nextlat_dist.errors import UserError
from nextlat_dist.reporting.number_text import whole_number_of

MOST_RANKS = 1 << 30  # far above any job: a larger number is a mistake
MEETING_POINT = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_number(name: str, default: int, least: int = 0) -> int:
    """The number in the environment variable `name`, `default` without it.

    Raises:
        UserError: it is no whole number of at least `least`.
    """
    given = os.environ.get(name)
    if given is None:
        return default
    number = whole_number_of(given)
    if number is None or not least <= number <= MOST_RANKS:
        what = "the number of ranks" if name == "WORLD_SIZE" else f"a whole number from {least} on"
        raise UserError(f"the environment variable {name} is {given!r}, it must be {what}")
    return number


def check_launch() -> None:
    """What a launched rank needs to meet the others; `RANK` is set.

    Raises:
        UserError: something is missing or is no number.
    """
    rank = launched_number("RANK", 0)
    missing = [name for name in MEETING_POINT if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the environment variable RANK is set, but not {', '.join(missing)}; start ranks with a script of launch/ "
            "or torchrun, or unset RANK for one rank"
        )
    ranks = launched_number("WORLD_SIZE", 1, least=1)
    if rank >= ranks:
        raise UserError(f"the environment variable RANK is {rank}, it must be below WORLD_SIZE={ranks}")
    launched_number("LOCAL_RANK", 0)
    port = launched_number("MASTER_PORT", 0, least=1)
    if port > 65535:
        raise UserError(f"the environment variable MASTER_PORT is {port}, it must be a port: at most 65535")


def is_first_rank() -> bool:
    """Whether this process speaks for all: rank 0, or no rank at all (a `RANK` that is no number included)."""
    return whole_number_of(os.environ.get("RANK", "0")) in (0, None)
