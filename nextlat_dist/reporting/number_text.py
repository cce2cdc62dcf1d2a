"""Numbers as people write them, in configurations and on command lines: `1_000_000`, `1e9`, `3e-4`, `0x10`."""

from __future__ import annotations

import re
from decimal import Decimal

MOST_DIGITS = 40
_DECIMAL = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]{1,9})?")
_OTHER_BASE = re.compile(r"[-+]?0(x[0-9a-fA-F_]{1,40}|b[01_]{1,64}|o[0-7_]{1,40})", re.IGNORECASE)
_NOT_FINITE = re.compile(r"([-+]?)\.?(inf|infinity|nan)", re.IGNORECASE)
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


def number_of(text: str) -> int | float | None:
    """The number that a text is; None where it is none.

    A whole one is an int and exact up to `MOST_DIGITS` digits; beyond that it is a float.
    """
    text = text.strip()
    if _OTHER_BASE.fullmatch(text):
        return int(digits, 0) if (digits := text.replace("_", ""))[-1] not in "xXbBoO" else None
    if special := _NOT_FINITE.fullmatch(text):
        return float(special[1] + special[2])
    if not _DECIMAL.fullmatch(text):
        return None
    number = Decimal(text.replace("_", ""))
    whole = "." not in text if number.is_zero() else number == number.to_integral_value()
    return int(number) if whole and number.adjusted() < MOST_DIGITS else float(number)


def whole_number_of(text: str) -> int | None:
    """The whole number that a text is; None where it is none. A leading 0 is none: some read it as octal."""
    number = number_of(text)
    return None if not isinstance(number, int) or LEADING_ZERO.fullmatch(text.strip()) else number
